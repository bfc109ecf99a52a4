"""Helpers for tests of a planner's registry: what happens to it, and what its readers are."""

from collections.abc import Sequence

from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.paths import cache_path
from support.plans import ROOT, manifest_of, plan_of

LARGE_BYTES = 10**12


class FakeClock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def manifest_of_items(items: int, root: str = ROOT, generation: int = 1) -> Manifest:
    """A manifest of items with ids of three digits."""
    return manifest_of([f"{i:03}" for i in range(items)], root, generation)


MANIFEST = manifest_of_items(10)


def put_in_force(registry: Registry, manifest: Manifest) -> None:
    """List a data root, as the daemon does."""
    registry.set_manifest(registry.catalog.assign_numbers(manifest))
    registry.finish_adoption()
    start_due_streams(registry)


def start_due_streams(registry: Registry) -> None:
    """Start the seeded streams that are due, as the prefetcher does in threads."""
    for data_root, epoch in registry.seeded.pop_due():
        registry.start_seeded(registry.seeded.prepare(data_root, epoch))


def register(registry: Registry, items: Sequence[int], listed: Manifest = MANIFEST, **changes: object) -> Reader:
    """Register a reader of the items of the manifest `listed`; `changes` are fields of its plan."""
    return registry.register(registry.prepare(*plan_of(listed, items, **changes)))  # type: ignore[arg-type]  # any field


def report_reads(registry: Registry, job: str, *items: int, manifest: Manifest = MANIFEST) -> None:
    """A process of the job reports that it has read both parts of the items."""
    registry.record_reads(job, [manifest.part_name(item, part) for item in items for part in (0, 1)])


def add_items(registry: Registry, *items: int) -> None:
    """Both parts of the items are cached."""
    for item in items:
        for part in (0, 1):
            registry.files.add(path_of(item, part))


def path_of(item: int, part: int = 0, manifest: Manifest = MANIFEST) -> str:
    """The path of a part of an item."""
    name = manifest.part_name(item, part)
    return cache_path(name.bucket, name.name)


def readers_by_stream(registry: Registry) -> dict[str, Reader]:
    """The readers by the ids of their streams, with the seeded streams that were due."""
    start_due_streams(registry)
    return {reader.stream.id: reader for reader in registry}


def positions(registry: Registry) -> dict[str, int]:
    """The positions of the streams by their ids."""
    return {reader.stream.id: reader.stream.position for reader in registry}


def order_of(reader: Reader) -> list[int]:
    """The order of the reader's epoch."""
    return [int(item) for item in reader.stream.epoch.order]
