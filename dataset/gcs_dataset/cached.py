"""The loader that reads the daemon's cache: a file, else the daemon, else GCS itself."""

import logging
import os
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gcs_dataset.decode import decode
from gcs_dataset.gcs import gcs_pil_loader
from gcs_dataset.reports import ReadReporter, Reads
from gcs_prefetchd.client import DaemonClient
from gcs_prefetchd.errors import ItemError, PrefetchdError
from gcs_prefetchd.names import cache_path, parse_object_uri
from gcs_prefetchd.stamp import read_checked

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
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str],
        *,
        demand_timeout_s: float = DEMAND_TIMEOUT_S,
        fallback: Callable[..., Image.Image] = gcs_pil_loader,
    ) -> None:
        self.cache_dir = Path(cache_dir)
        self.demand_timeout_s = demand_timeout_s
        self.fallback = fallback
        self.job = uuid.uuid4().hex
        self._by_process: dict[int, _Connections] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_by_process": {}}

    def __call__(self, uri: str, mode: str | None = "RGB") -> Image.Image:
        """The image, converted to `mode`; None keeps the stored mode. Raises what the fallback raises."""
        return self.load_many([uri], [mode])[0]

    def load_many(self, uris: Sequence[str], modes: Sequence[str | None]) -> list[Image.Image]:
        """The images of several URIs; what is not in the cache is asked for in one request."""
        images = [self._from_cache(uri, mode) for uri, mode in zip(uris, modes, strict=True)]
        missing = [i for i, image in enumerate(images) if image is None]
        reads = Reads(hits=len(uris) - len(missing))
        try:
            if missing:
                self._load_missing(images, missing, uris, modes, reads)
        finally:
            self._here().reporter.add(reads, uris)
        return [image for image in images if image is not None]

    def close(self) -> None:
        """Send the last report and close this process's connections; a later read makes new ones."""
        connections = self._by_process.pop(os.getpid(), None)
        if connections is not None:
            connections.reporter.close()
            connections.daemon.close()

    def _from_cache(self, uri: str, mode: str | None) -> Image.Image | None:
        name = parse_object_uri(uri)
        data = read_checked(f"{self.cache_dir}/objects", cache_path(name.bucket, name.name))
        if data is None:
            return None
        try:
            return decode(data, uri, mode)
        except ItemError:
            return None  # perhaps the object has been repaired since; if not, the fallback says the same

    def _load_missing(
        self,
        images: list[Image.Image | None],
        missing: list[int],
        uris: Sequence[str],
        modes: Sequence[str | None],
        reads: Reads,
    ) -> None:
        started_s = time.perf_counter()
        try:
            self._demand(images, missing, uris, modes)
            left = [i for i in missing if images[i] is None]
            reads.misses, reads.fallbacks = len(missing) - len(left), len(left)
            self._fall_back(images, left, uris, modes)
        finally:
            reads.wait_s = time.perf_counter() - started_s

    def _demand(
        self, images: list[Image.Image | None], missing: list[int], uris: Sequence[str], modes: Sequence[str | None]
    ) -> None:
        """Have the daemon fetch what is missing and read it; what that does not bring stays None."""
        here = self._here()
        try:
            errors = here.daemon.fetch([uris[i] for i in missing])
        except PrefetchdError as exc:
            here.warn(str(exc))
            return
        for i, error in zip(missing, errors, strict=True):
            if not error:
                images[i] = self._from_cache(uris[i], modes[i])
            if images[i] is None:
                here.warn(f"daemon of {self.cache_dir}: {uris[i]}: {error or 'said to be cached, but cannot be read'}")
        if all(images[i] is not None for i in missing):
            here.recovered()

    def _fall_back(
        self, images: list[Image.Image | None], left: list[int], uris: Sequence[str], modes: Sequence[str | None]
    ) -> None:
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
