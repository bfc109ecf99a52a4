"""Manifests made by hand, and plans as readers send them."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gcs_prefetchd.shared.epoch_order import Indices, order_digest, plan_order
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Ids, Manifest, build_manifest
from gcs_prefetchd.shared.messages import Plan
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, ObjectVersion

ROOT = "gs://pictures/train"


def manifest_of(
    ids: Iterable[str], root: str = ROOT, generation: int = 1, size: int = 1, generations: Mapping[str, int] | None = None
) -> Manifest:
    """A manifest of these items. All parts have one size, and one generation unless `generations` gives another by id."""
    data_root = DataRoot.parse(root)
    versions = [
        ObjectVersion(
            ObjectName(data_root.bucket, data_root.folder + ItemPatterns().part_name(item_id, part)),
            (generations or {}).get(item_id, generation),
            size,
            1,
        )
        for item_id in ids
        for part in (0, 1)
    ]
    return build_manifest(data_root, ItemPatterns(), versions)


def manifest_of_many(items: int) -> Manifest:
    """A manifest of many items, with ids of seven digits; made in no time."""
    digits = np.arange(items)[:, None] // 10 ** np.arange(6, -1, -1) % 10
    ids = Ids((digits + ord("0")).astype(np.uint8).reshape(-1), np.arange(7, 7 * items + 1, 7))
    column = np.ones((items, 2), dtype=np.int64)
    return Manifest(DataRoot.parse(ROOT), ItemPatterns(), ids, column, column, column, (), "many")


def indices_of(items: Iterable[int]) -> Indices:
    """Item indices as a plan has them."""
    return np.array(list(items), dtype=np.uint32)


def plan_of(listed: Manifest, items: Sequence[int], /, *, stream: str = "job/0", **changes: object) -> tuple[Plan, Indices]:
    """A valid plan of a reader, apart from the changes; its digest is that of its order."""
    indices = indices_of(items)
    values: dict[str, object] = {
        "job": stream.partition("/")[0],
        "stream": stream,
        "data_root": listed.data_root.uri,
        "manifest": listed.digest,
        "kind": "listed",
        "seed": 0,
        "epoch": 0,
        "position": 0,
        "rank": 0,
        "world": 1,
        "drop_last": 0,
        "start": 0,
    } | changes
    if "digest" not in values:
        values["digest"] = order_digest(_order_of(values, indices))
    return Plan(**values), indices  # type: ignore[arg-type]  # as any reader may send it


def _order_of(values: dict[str, object], indices: Indices) -> Indices:
    fields = {key: values[key] for key in ("kind", "seed", "epoch", "rank", "world", "start")}
    return plan_order(**fields, indices=indices, drop_last=bool(values["drop_last"]))  # type: ignore[arg-type]  # as above
