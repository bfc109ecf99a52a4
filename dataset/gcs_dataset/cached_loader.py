"""The loader that reads the daemon's cache: the file, else through the daemon, else from GCS itself."""

import logging
import os
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gcs_dataset.decode import decode
from gcs_dataset.expected_stamps import ExpectedStamps
from gcs_dataset.gcs_loader import gcs_pil_loader
from gcs_dataset.read_reports import ReadCounts, ReadReporter
from gcs_prefetchd.shared.checked_read import Stamp, read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.errors import ItemError, PrefetchdError
from gcs_prefetchd.shared.manifest import Manifest, load_manifest
from gcs_prefetchd.shared.paths import cache_path_of_uri

__all__ = ["CachedLoader"]

DEMAND_TIMEOUT_S = 10.0

log = logging.getLogger("gcs_dataset")


class CachedLoader:
    """A loader of `gs://` URIs that reads the cache directory of a daemon on this node: `loader(uri)` is a PIL image.

    It reads and verifies cached files, and demands the others from the daemon. If the daemon is absent, needs longer than
    `demand_timeout_s` or fails, `fallback` reads the object from GCS, with one warning. So every read that GCS could serve
    succeeds, whatever the daemon does. Any process can have a copy: each process opens its own connections and threads. `job`
    (a random id) ties the reports of all copies together. `close()` is optional: the last report is also sent when the process
    exits.

    With a `manifest`, a file counts only if it has the generation that the manifest names, and objects that are loaded together
    (an item's image and label) never mix generations: if the daemon cannot deliver all of them as they were listed, because
    they have changed in the bucket since, all of them are read from GCS as they are now.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str],
        *,
        demand_timeout_s: float = DEMAND_TIMEOUT_S,
        fallback: Callable[..., Image.Image] = gcs_pil_loader,
        manifest: Manifest | None = None,
    ) -> None:
        self.cache_dir = Path(cache_dir)
        self.demand_timeout_s = demand_timeout_s
        self.fallback = fallback
        self.manifest = manifest
        self.job = uuid.uuid4().hex
        self._expected = ExpectedStamps(manifest) if manifest is not None else None
        self._by_process: dict[int, _Connections] = {}

    def use_manifest(self, manifest: Manifest) -> None:
        """Use this manifest from the next read on. Copies in other processes keep theirs."""
        self._expected = ExpectedStamps(manifest)
        self.manifest = manifest

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_by_process": {}, "_expected": None}
        if self.manifest is not None and (folder := self.cache_dir / "manifests" / self.manifest.digest).exists():
            state["manifest"] = folder  # spawned workers map the daemon's files instead of getting a copy through a pipe
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.manifest, Path):
            self.manifest = load_manifest(self.manifest, verify=False)
        if self.manifest is not None:
            self._expected = ExpectedStamps(self.manifest)

    def __call__(self, uri: str, mode: str | None = "RGB") -> Image.Image:
        """The image, converted to `mode`; None keeps the stored mode. Raises what the fallback raises."""
        return self.load_many([uri], [mode])[0]

    def load_many(self, uris: Sequence[str], modes: Sequence[str | None]) -> list[Image.Image]:
        """The images of several URIs; those that are not cached are demanded in one request."""
        return self.load_item(None, uris, modes)

    def load_item(self, index: int | None, uris: Sequence[str], modes: Sequence[str | None]) -> list[Image.Image]:
        """The same for the parts of one item; its index in the manifest makes it faster to find its generations."""
        wanted = _Wanted(uris, modes, self._expected.of(uris, index) if self._expected is not None else [None] * len(uris))
        images = [self._load_cached(wanted, i) for i in range(len(uris))]
        missing = [i for i, image in enumerate(images) if image is None]
        counts = ReadCounts(hits=len(uris) - len(missing))
        try:
            if missing:
                self._load_missing(images, missing, wanted, counts)
        finally:
            self._connections().reporter.add(counts, uris)
        return [image for image in images if image is not None]

    def close(self) -> None:
        """Send the last report and close this process's connections; a later read opens new ones."""
        connections = self._by_process.pop(os.getpid(), None)
        if connections is not None:
            connections.reporter.close()
            connections.daemon.close()

    def _load_cached(self, wanted: "_Wanted", i: int) -> Image.Image | None:
        data = read_checked(f"{self.cache_dir}/objects", cache_path_of_uri(wanted.uris[i]), wanted.stamps[i])
        if data is None:
            return None
        try:
            return decode(data, wanted.uris[i], wanted.modes[i])
        except ItemError:
            return None  # the object may have been repaired since; if not, the fallback raises the same error

    def _load_missing(
        self, images: list[Image.Image | None], missing: list[int], wanted: "_Wanted", counts: ReadCounts
    ) -> None:
        started_s = time.perf_counter()
        try:
            self._demand(images, missing, wanted)
            failed = [i for i in missing if images[i] is None]
            if failed and self._expected is not None:
                failed = list(range(len(images)))  # what GCS returns now must not be mixed with what was listed earlier
            counts.hits = len([i for i in range(len(images)) if i not in missing and i not in failed])
            counts.misses, counts.fallbacks = len(images) - counts.hits - len(failed), len(failed)
            self._fall_back(images, failed, wanted)
        finally:
            counts.wait_s = time.perf_counter() - started_s

    def _demand(self, images: list[Image.Image | None], missing: list[int], wanted: "_Wanted") -> None:
        """Demand the missing objects from the daemon and read them; those that it cannot deliver stay None."""
        connections = self._connections()
        try:
            errors = connections.daemon.fetch([wanted.uris[i] for i in missing])
        except PrefetchdError as exc:
            connections.warn_once(str(exc))
            return
        for i, error in zip(missing, errors, strict=True):
            if not error:
                images[i] = self._load_cached(wanted, i)
            if images[i] is None:
                reason = error or self._reason_unreadable(wanted, i)
                connections.warn_once(f"daemon of {self.cache_dir}: {wanted.uris[i]}: {reason}")
        if all(images[i] is not None for i in missing):
            connections.reset_warning()

    def _reason_unreadable(self, wanted: "_Wanted", i: int) -> str:
        if wanted.stamps[i] is None:
            return "reported as cached, but cannot be read"
        return "has changed in the bucket since it was listed, or cannot be read"

    def _fall_back(self, images: list[Image.Image | None], failed: list[int], wanted: "_Wanted") -> None:
        uris, modes = wanted.uris, wanted.modes
        load_many = getattr(self.fallback, "load_many", None)
        if load_many is not None:
            loaded = load_many([uris[i] for i in failed], [modes[i] for i in failed])
        else:
            loaded = [self.fallback(uris[i]) if modes[i] == "RGB" else self.fallback(uris[i], mode=modes[i]) for i in failed]
        for i, image in zip(failed, loaded, strict=True):
            images[i] = image

    def _connections(self) -> "_Connections":
        """This process's connections. setdefault is atomic, so threads need no lock, which a fork could leave locked."""
        pid = os.getpid()
        connections = self._by_process.get(pid)
        return connections or self._by_process.setdefault(pid, _Connections(self))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The objects to load together; the stamps are those that the manifest names, None for an object that may have any."""

    uris: Sequence[str]
    modes: Sequence[str | None]
    stamps: Sequence[Stamp | None]


class _Connections:
    """What one process has open for a loader, and whether it has warned. Closed by `CachedLoader.close` or with the loader."""

    def __init__(self, loader: CachedLoader) -> None:
        self.daemon = DaemonClient(loader.cache_dir, loader.demand_timeout_s)
        self.reporter = ReadReporter(loader.cache_dir, loader.job)
        self._has_warned = False
        weakref.finalize(self, _close_soon, os.getpid(), self.daemon, self.reporter)

    def warn_once(self, reason: str) -> None:
        """Log why the daemon is not used; once, until it works again."""
        if not self._has_warned:
            self._has_warned = True
            log.warning("%s; reading from GCS until the daemon is back", reason)

    def reset_warning(self) -> None:
        """The daemon works: log its next failure again."""
        self._has_warned = False


def _close_soon(pid: int, daemon: DaemonClient, reporter: ReadReporter) -> None:
    if pid == os.getpid():  # what a fork copied is closed by the parent
        reporter.request_stop()
        daemon.close()
