"""The loader that reads the daemon's cache: a file, else the daemon, else GCS itself."""

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
from gcs_dataset.expected_checksums import Versions
from gcs_dataset.gcs_loader import gcs_pil_loader
from gcs_dataset.read_reports import ReadReporter, Reads
from gcs_prefetchd.shared.checksums import Stamp, read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.errors import ItemError, PrefetchdError
from gcs_prefetchd.shared.manifest import Manifest, load_manifest
from gcs_prefetchd.shared.paths import cache_path_of_uri

__all__ = ["CachedLoader"]

DEMAND_TIMEOUT_S = 10.0

log = logging.getLogger("gcs_dataset")


class CachedLoader:
    """A loader of `gs://` URIs that reads the cache directory of a daemon on this node: `loader(uri)` is a PIL image.

    What lies in the cache is read from there and verified; what does not, the daemon is asked to fetch; and where it is
    absent, takes longer than `demand_timeout_s` or fails, `fallback` reads the object from GCS, with one warning. So every
    read that GCS could serve succeeds, whatever the daemon does. Any process can have a copy: connections and threads are
    made by each process for itself. `job` (a random id) ties the reports of all copies together. `close()` is optional: the
    last report is sent when the process ends, too.

    With a `manifest`, a file counts only if it is of the generation that the manifest names, and what is loaded together (an
    item's image and label) never mixes generations: where the daemon cannot bring all of it as it was listed, because it has
    changed in the bucket since, all of it is read from GCS as it is now.
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
        self._versions = Versions(manifest) if manifest is not None else None
        self._by_process: dict[int, _Connections] = {}

    def use_manifest(self, manifest: Manifest) -> None:
        """Hold to this manifest from the next read on. Copies in other processes keep the one that they have."""
        self._versions = Versions(manifest)
        self.manifest = manifest

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_by_process": {}, "_versions": None}
        if self.manifest is not None and (folder := self.cache_dir / "manifests" / self.manifest.digest).exists():
            state["manifest"] = folder  # spawned workers map the daemon's files instead of getting a copy through a pipe
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.manifest, Path):
            self.manifest = load_manifest(self.manifest, verify=False)
        if self.manifest is not None:
            self._versions = Versions(self.manifest)

    def __call__(self, uri: str, mode: str | None = "RGB") -> Image.Image:
        """The image, converted to `mode`; None keeps the stored mode. Raises what the fallback raises."""
        return self.load_many([uri], [mode])[0]

    def load_many(self, uris: Sequence[str], modes: Sequence[str | None]) -> list[Image.Image]:
        """The images of several URIs; what is not in the cache is asked for in one request."""
        return self.load_item(None, uris, modes)

    def load_item(self, index: int | None, uris: Sequence[str], modes: Sequence[str | None]) -> list[Image.Image]:
        """The same for the parts of one item; its index in the manifest finds its generations sooner."""
        wanted = _Wanted(uris, modes, self._versions.of(uris, index) if self._versions is not None else [None] * len(uris))
        images = [self._from_cache(wanted, i) for i in range(len(uris))]
        missing = [i for i, image in enumerate(images) if image is None]
        reads = Reads(hits=len(uris) - len(missing))
        try:
            if missing:
                self._load_missing(images, missing, wanted, reads)
        finally:
            self._here().reporter.add(reads, uris)
        return [image for image in images if image is not None]

    def close(self) -> None:
        """Send the last report and close this process's connections; a later read makes new ones."""
        connections = self._by_process.pop(os.getpid(), None)
        if connections is not None:
            connections.reporter.close()
            connections.daemon.close()

    def _from_cache(self, wanted: "_Wanted", i: int) -> Image.Image | None:
        data = read_checked(f"{self.cache_dir}/objects", cache_path_of_uri(wanted.uris[i]), wanted.stamps[i])
        if data is None:
            return None
        try:
            return decode(data, wanted.uris[i], wanted.modes[i])
        except ItemError:
            return None  # perhaps the object has been repaired since; if not, the fallback says the same

    def _load_missing(self, images: list[Image.Image | None], missing: list[int], wanted: "_Wanted", reads: Reads) -> None:
        started_s = time.perf_counter()
        try:
            self._demand(images, missing, wanted)
            left = [i for i in missing if images[i] is None]
            if left and self._versions is not None:
                left = list(range(len(images)))  # what is read from GCS now must not stand beside what was listed earlier
            reads.hits = len([i for i in range(len(images)) if i not in missing and i not in left])
            reads.misses, reads.fallbacks = len(images) - reads.hits - len(left), len(left)
            self._fall_back(images, left, wanted)
        finally:
            reads.wait_s = time.perf_counter() - started_s

    def _demand(self, images: list[Image.Image | None], missing: list[int], wanted: "_Wanted") -> None:
        """Have the daemon fetch what is missing and read it; what that does not bring stays None."""
        here = self._here()
        try:
            errors = here.daemon.fetch([wanted.uris[i] for i in missing])
        except PrefetchdError as exc:
            here.warn(str(exc))
            return
        for i, error in zip(missing, errors, strict=True):
            if not error:
                images[i] = self._from_cache(wanted, i)
            if images[i] is None:
                here.warn(f"daemon of {self.cache_dir}: {wanted.uris[i]}: {error or self._why_not(wanted, i)}")
        if all(images[i] is not None for i in missing):
            here.recovered()

    def _why_not(self, wanted: "_Wanted", i: int) -> str:
        if wanted.stamps[i] is None:
            return "said to be cached, but cannot be read"
        return "has changed in the bucket since it was listed, or cannot be read"

    def _fall_back(self, images: list[Image.Image | None], left: list[int], wanted: "_Wanted") -> None:
        uris, modes = wanted.uris, wanted.modes
        load_many = getattr(self.fallback, "load_many", None)
        if load_many is not None:
            loaded = load_many([uris[i] for i in left], [modes[i] for i in left])
        else:
            loaded = [self.fallback(uris[i]) if modes[i] == "RGB" else self.fallback(uris[i], mode=modes[i]) for i in left]
        for i, image in zip(left, loaded, strict=True):
            images[i] = image

    def _here(self) -> "_Connections":
        """This process's connections. setdefault is atomic, so threads need no lock, which a fork could leave locked."""
        pid = os.getpid()
        connections = self._by_process.get(pid)
        return connections or self._by_process.setdefault(pid, _Connections(self))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be loaded together; the stamps are those that the manifest asks for, None where anything will do."""

    uris: Sequence[str]
    modes: Sequence[str | None]
    stamps: Sequence[Stamp | None]


class _Connections:
    """What one process has open for a loader, and whether it has warned. Ends with the loader, or by `end`."""

    def __init__(self, loader: CachedLoader) -> None:
        self.daemon = DaemonClient(loader.cache_dir, loader.demand_timeout_s)
        self.reporter = ReadReporter(loader.cache_dir, loader.job)
        self._warned = False
        weakref.finalize(self, _end, os.getpid(), self.daemon, self.reporter)

    def warn(self, why: str) -> None:
        """Log why the daemon is not used; once, until it works again."""
        if not self._warned:
            self._warned = True
            log.warning("%s; reading from GCS until it is back", why)

    def recovered(self) -> None:
        """The daemon works: its next failure is news again."""
        self._warned = False


def _end(pid: int, daemon: DaemonClient, reporter: ReadReporter) -> None:
    if pid == os.getpid():  # what a fork copied is its parent's to end
        reporter.end_soon()
        daemon.close()
