"""The daemon from start to stop."""

from pathlib import Path

from gcs_prefetchd.testing import GCSServer
from support import make_settings, put_items, running


async def test_the_data_root_is_prefetched_before_any_reader_has_come(gcs: GCSServer, tmp_path: Path) -> None:
    objects = put_items(gcs, 20)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as service:
        await service.prefetcher.settled()
        assert len(service.cache) == len(objects)
