"""The endpoints of the Unix socket."""

import asyncio
import signal
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gcs_prefetchd.service.daemon import Daemon
from gcs_prefetchd.shared.checked_read import read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient, short_address
from gcs_prefetchd.shared.errors import DaemonUnavailableError, ProtocolError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import build_manifest, load_manifest
from gcs_prefetchd.shared.messages import Plan, ReadReport, pack_indices
from gcs_prefetchd.testing import GCSServer
from support.daemons import BUCKET, DATA_ROOT, make_settings, put_items, running
from support.plans import manifest_of, plan_of

ITEMS = 6
TIMEOUT_S = 20.0
HOLD_A_LEASE = """
import sys
from pathlib import Path
from gcs_prefetchd.shared.daemon_client import DaemonClient, short_address
lease = DaemonClient(Path(sys.argv[1])).lease(sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
async def daemon(gcs: GCSServer, tmp_path: Path) -> AsyncIterator[Daemon]:
    """A daemon over six items that prefetches one item ahead."""
    put_items(gcs, ITEMS)
    async with running(make_settings(tmp_path / "cache", gcs.url, window_items=1)) as daemon:
        await daemon.prefetcher.settled()
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[DaemonClient]:
    """A client of the daemon. Every call blocks, so tests call it in a thread."""
    with closing(DaemonClient(daemon.directory.path)) as client:
        yield client


def report(*uris: str, job: str = "job", reporter: str = "reporter", number: int = 1, hits: int = 0) -> ReadReport:
    return ReadReport(job, reporter, number, hits, 0, 0, 0.0, list(uris))


async def plan_for(client: DaemonClient, order: list[int], **changes: object) -> tuple[Plan, bytes]:
    newest = await asyncio.to_thread(client.manifest, DATA_ROOT)
    manifest = await asyncio.to_thread(load_manifest, Path(newest.path))
    plan, indices = plan_of(manifest, order, **({"stream": "s", "job": "job", "epoch": 3} | changes))  # type: ignore[arg-type]
    return plan, pack_indices(indices.tolist())


async def test_a_demanded_object_is_on_disk_when_the_response_arrives(daemon: Daemon, client: DaemonClient) -> None:
    uri = f"{DATA_ROOT}/images/00003.jpg"
    assert await asyncio.to_thread(client.fetch, [uri]) == [""]
    assert read_checked(daemon.directory.objects, f"{BUCKET}/train/images/00003.jpg") is not None


async def test_each_object_of_a_demand_has_its_own_result(client: DaemonClient) -> None:
    uris = [f"{DATA_ROOT}/images/00001.jpg", f"{DATA_ROOT}/images/none.jpg", "gs://elsewhere/x.jpg", "no uri"]
    errors = await asyncio.to_thread(client.fetch, uris)
    assert errors[0] == ""
    assert "none.jpg: GCS returned 404" in errors[1]
    assert "not within a data root" in errors[2]
    assert "not a gs:// URI" in errors[3]


async def test_an_object_that_belongs_to_no_item_can_be_demanded(gcs: GCSServer, client: DaemonClient) -> None:
    gcs.put(BUCKET, "train/classes.txt", b"dog\ncat\n")
    assert await asyncio.to_thread(client.fetch, [f"{DATA_ROOT}/classes.txt"]) == [""]


async def test_the_manifest_that_the_daemon_names_can_be_loaded(client: DaemonClient) -> None:
    newest = await asyncio.to_thread(client.manifest, DATA_ROOT)
    assert newest.items == len(load_manifest(Path(newest.path))) == ITEMS


async def test_an_error_names_the_data_root_that_is_not_served(client: DaemonClient) -> None:
    with pytest.raises(ProtocolError, match=r"gs://pictures/test is not served .* it serves gs://pictures/train"):
        await asyncio.to_thread(client.manifest, "gs://pictures/test")


async def test_reads_are_counted_and_advance_the_stream_of_their_job(daemon: Daemon, client: DaemonClient) -> None:
    await asyncio.to_thread(client.send_plan, *(await plan_for(client, [4, 2, 0])))
    uris = [f"{DATA_ROOT}/{part}" for part in ("images/00004.jpg", "labels/00004.png", "images/00002.jpg")]
    await asyncio.to_thread(client.report_reads, report(*uris, hits=3))
    stats = await asyncio.to_thread(client.stats)
    assert stats["reads"]["hits"] == 3
    assert [(s["id"], s["epoch"], s["position"], s["length"]) for s in stats["streams"]] == [("s", 3, 2, 3)]


async def test_the_next_item_of_a_plan_is_fetched_next(gcs: GCSServer, daemon: Daemon, client: DaemonClient) -> None:
    await asyncio.to_thread(client.send_plan, *(await plan_for(client, [5, 1, 3])))
    await daemon.prefetcher.settled()
    assert gcs.counts.media[f"{BUCKET}/train/images/00005.jpg"] == 1
    await asyncio.to_thread(client.report_reads, report(f"{DATA_ROOT}/images/00005.jpg"))
    await daemon.prefetcher.settled()
    assert gcs.counts.media[f"{BUCKET}/train/labels/00001.png"] == 1


@pytest.mark.parametrize(
    ("order", "changes", "message"),
    [
        ([0, ITEMS], {}, "index 6 is beyond the 6 items"),
        ([], {}, "field 'indices' is empty"),
        ([0], {"manifest": "feed"}, "field 'manifest': 'feed' is not a known manifest"),
        ([0], {"data_root": "gs://other"}, "is not a known manifest of 'gs://other'"),
        ([0], {"position": 2}, "field 'position': 2 is beyond the plan's 1 items"),
        ([0], {"digest": "0" * 16}, "field 'digest' does not match the order"),
    ],
)
async def test_an_invalid_plan_is_rejected_by_its_field(
    client: DaemonClient, order: list[int], changes: dict[str, object], message: str
) -> None:
    plan, packed = await plan_for(client, order, **changes)
    with pytest.raises(ProtocolError, match=message):
        await asyncio.to_thread(client.send_plan, plan, packed)


@pytest.mark.parametrize("kept", [2, 0])
async def test_a_plan_of_a_manifest_that_only_the_disk_has_is_accepted(daemon: Daemon, client: DaemonClient, kept: int) -> None:
    """So after a restart, for a job that still uses the earlier manifest: its streams register at the same time."""
    newest = await asyncio.to_thread(client.manifest, DATA_ROOT)
    earlier = manifest_of([*(f"{number:05}" for number in range(kept)), "gone", "lost"], DATA_ROOT)
    await asyncio.to_thread(earlier.save, daemon.directory.manifests)
    plans = [plan_of(earlier, [kept + 1, kept], stream=f"resumed/{number}") for number in range(3)]
    await asyncio.gather(
        *(asyncio.to_thread(client.send_plan, plan, pack_indices(indices.tolist())) for plan, indices in plans)
    )
    stats = await asyncio.to_thread(client.stats)
    assert [(s["id"], s["length"]) for s in sorted(stats["streams"], key=lambda s: s["id"])] == [
        (f"resumed/{number}", 2) for number in range(3)
    ]
    assert {int(number) for reader in daemon.registry for number in reader.stream.epoch.order} == {ITEMS, ITEMS + 1}
    assert await asyncio.to_thread(client.manifest, DATA_ROOT) == newest


@pytest.mark.parametrize("flaw", ["damaged", "of another data root", "with other patterns"])
async def test_a_plan_of_an_unusable_manifest_on_disk_is_rejected(daemon: Daemon, client: DaemonClient, flaw: str) -> None:
    other = manifest_of(["a"], "gs://pictures/other" if flaw == "of another data root" else DATA_ROOT)
    if flaw == "with other patterns":
        versions = [version for item in range(len(other)) for version in other.versions(item)]
        other = build_manifest(other.data_root, ItemPatterns(("images/{id}.jpg",)), versions)
    folder = other.save(daemon.directory.manifests)
    if flaw == "damaged":
        (folder / "size.npy").write_bytes(b"")
    plan, indices = plan_of(other, [0], data_root=DATA_ROOT)
    with pytest.raises(ProtocolError, match=f"field 'manifest': '{other.digest}' is not a known manifest"):
        await asyncio.to_thread(client.send_plan, plan, pack_indices(indices.tolist()))


# Leases


async def streams_are(client: DaemonClient, *ids: str) -> None:
    """Request the status until the daemon has these streams: its event loop has to notice the end of a lease first."""
    async with asyncio.timeout(TIMEOUT_S):
        while (await asyncio.to_thread(client.status)).streams != list(ids):
            pass


async def test_the_streams_of_a_job_live_as_long_as_its_lease(daemon: Daemon, client: DaemonClient) -> None:
    lease = await asyncio.to_thread(client.lease, "job")
    await asyncio.to_thread(client.send_plan, *(await plan_for(client, [5, 1])))
    await asyncio.to_thread(client.send_plan, *(await plan_for(client, [3], stream="t")))
    await asyncio.to_thread(client.send_plan, *(await plan_for(client, [4], stream="other", job="other")))
    assert lease.is_held
    assert (await asyncio.to_thread(client.status)).streams == ["s", "t", "other"]
    lease.close()
    await streams_are(client, "other")


async def test_the_seeded_order_is_left_when_the_last_lease_ends(daemon: Daemon, client: DaemonClient) -> None:
    lease = await asyncio.to_thread(client.lease, "job")
    await asyncio.to_thread(client.send_plan, *(await plan_for(client, [5, 1])))
    lease.close()
    await streams_are(client)
    await daemon.prefetcher.settled()
    assert [reader.is_seeded for reader in daemon.registry] == [True]


async def test_a_job_ends_when_its_process_is_killed(daemon: Daemon, client: DaemonClient) -> None:
    packed = await plan_for(client, [5, 1], job="killed", stream="killed")
    killed = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLD_A_LEASE, str(daemon.directory.path), "killed"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert killed.stdout is not None
    assert await killed.stdout.readline() == b"held\n"
    await asyncio.to_thread(client.send_plan, *packed)
    await asyncio.to_thread(client.send_plan, *(await plan_for(client, [3])))
    killed.send_signal(signal.SIGKILL)
    await streams_are(client, "s")
    await killed.wait()


async def test_a_daemon_that_stops_ends_its_leases_at_once(gcs: GCSServer, tmp_path: Path) -> None:
    """Each lease gets its response. A daemon that waited for the readers would cancel them in the end, without a response."""
    put_items(gcs, 1)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        with short_address(daemon.directory.socket) as address:
            response, request = await asyncio.open_unix_connection(address)
        request.write(b"GET /v1/lease?job=raw HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with closing(DaemonClient(daemon.directory.path)) as client:
            lease = await asyncio.to_thread(client.lease, "job")
            await asyncio.to_thread(client.status)
            assert lease.is_held
    assert (await asyncio.wait_for(response.read(), TIMEOUT_S)).startswith(b"HTTP/1.1 200 ")
    assert not lease.is_held
    lease.close()
    request.close()


async def test_a_report_with_a_name_that_is_not_an_object_is_rejected(client: DaemonClient) -> None:
    with pytest.raises(ProtocolError, match="field 'objects'"):
        await asyncio.to_thread(client.report_reads, report("images/00001.jpg"))


async def test_a_rejected_report_counts_nothing(client: DaemonClient) -> None:
    """The reader adds its counts to the next report."""
    with pytest.raises(ProtocolError):
        await asyncio.to_thread(client.report_reads, report("images/00001.jpg", hits=5))
    await asyncio.to_thread(client.report_reads, report(hits=5))
    assert (await asyncio.to_thread(client.stats))["reads"]["hits"] == 5


async def test_a_repeated_report_is_counted_once(client: DaemonClient) -> None:
    await asyncio.to_thread(client.send_plan, *(await plan_for(client, [4, 4, 4, 4], kind="listed")))
    uri = f"{DATA_ROOT}/images/00004.jpg"
    for number, reporter in [(1, "a"), (1, "a"), (2, "a"), (1, "a"), (1, "b")]:
        await asyncio.to_thread(client.report_reads, report(uri, reporter=reporter, number=number, hits=1))
    stats = await asyncio.to_thread(client.stats)
    assert (stats["reads"]["hits"], stats["streams"][0]["position"]) == (3, 3)


async def test_the_cached_objects_are_listed_by_prefix(daemon: Daemon, client: DaemonClient) -> None:
    cached = await asyncio.to_thread(client.cached_objects)
    assert len(cached) == len(daemon.cache) == 2 * ITEMS
    images = await asyncio.to_thread(client.cached_objects, f"{DATA_ROOT}/images/")
    assert [uri for uri in cached if "/images/" in uri] == images


async def test_only_the_user_and_the_group_can_reach_the_socket(daemon: Daemon) -> None:
    assert stat.S_IMODE(daemon.directory.socket.stat().st_mode) == 0o660


async def test_the_daemon_serves_a_directory_whose_path_is_longer_than_a_socket_address(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 1)
    deep = tmp_path / ("d" * 80) / ("e" * 80)
    async with running(make_settings(deep, gcs.url)) as daemon:
        with closing(DaemonClient(deep)) as client:
            assert (await asyncio.to_thread(client.status)).instance_id == daemon.instance_id


async def test_the_socket_is_removed_when_the_daemon_stops(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 1)
    async with running(make_settings(tmp_path / "cache", gcs.url)):
        pass
    with pytest.raises(DaemonUnavailableError, match="is a daemon running for this directory"):
        await asyncio.to_thread(DaemonClient(tmp_path / "cache").status)


# Settings


async def test_settings_of_a_running_daemon_can_be_changed(daemon: Daemon, client: DaemonClient) -> None:
    before = await asyncio.to_thread(client.settings)
    assert before == {"concurrency": 256, "min_concurrency": 8, "max_requests_per_s": None, "max_bytes_per_s": None}
    changed = await asyncio.to_thread(client.change_settings, {"concurrency": 16, "max_requests_per_s": 50})
    assert changed == before | {"concurrency": 16, "max_requests_per_s": 50.0}
    limits = (await asyncio.to_thread(client.stats))["limits"]
    assert (limits["concurrency"], limits["last_change_reason"], limits["allowed_requests_per_s"]) == (
        16,
        "setting_changed",
        50.0,
    )


async def test_an_invalid_setting_is_rejected_by_its_name(client: DaemonClient) -> None:
    with pytest.raises(ProtocolError, match="setting concurrency in the request: 0 should be"):
        await asyncio.to_thread(client.change_settings, {"concurrency": 0})
    with pytest.raises(ProtocolError, match="setting 'cache_size' cannot be changed while the daemon runs"):
        await asyncio.to_thread(client.change_settings, {"cache_size": 5})
