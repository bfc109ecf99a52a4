"""The daemon against a model of what each object may be: random sequences of operations, and every promise after each of them.

Server and daemon run in one event loop, which pauses between two steps: work in progress continues in the next step. A kill
leaves the directory as it is at that moment, and the next daemon starts with a copy of it.
"""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from gcs_prefetchd.service.daemon import Daemon
from gcs_prefetchd.shared.checked_read import read_checked, read_stamp
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.epoch_order import order_digest, plan_order
from gcs_prefetchd.shared.errors import PrefetchdError
from gcs_prefetchd.shared.manifest import load_manifest
from gcs_prefetchd.shared.messages import Plan, ReadReport, pack_indices
from gcs_prefetchd.shared.objects import DataRoot, ObjectName
from gcs_prefetchd.shared.paths import cache_path
from gcs_prefetchd.testing import Close, EmptyBody, Fault, FlippedByte, GCSServer, HtmlPage, Kind, Reset, Status
from support.caches import IN_MEMORY, content
from support.daemons import BUCKET, DATA_ROOT, make_settings
from support.faults import Tally

T = TypeVar("T")

ROOT = DataRoot.parse(DATA_ROOT)
ITEMS = [f"train/{part}" for item in "ab" for part in (f"images/{item}.jpg", f"labels/{item}.png")]
ITEMLESS = ["train/images/c.jpg"]  # parts of no item
LIMIT_BYTES = 1000
LARGEST_BYTES = 400
FAULTS: list[Fault] = [Status(503), Status(429, retry_after="1"), Reset(), Close(), EmptyBody(), FlippedByte(), HtmlPage()]

names = st.sampled_from(ITEMS + ITEMLESS)
sizes = st.integers(0, LARGEST_BYTES)


class Model(RuleBasedStateMachine):
    """The present and earlier content of the bucket, and so what each read may return."""

    tally = Tally("model")
    fetch_processes = 0

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.folder = Path(tempfile.mkdtemp(dir=IN_MEMORY))
        self.numbers = itertools.count(1)
        self.generations: dict[str, dict[int, bytes]] = {
            name: {} for name in ITEMS + ITEMLESS
        }  # every generation that ever existed
        self.live: dict[str, int] = {}
        self.allowed: dict[str, set[int]] = {name: set() for name in ITEMS + ITEMLESS}  # what a read may return
        self.failing = False
        self.cached_before: dict[str, int] = {}  # cached generations after the last step
        self.evicted = 0  # by daemons that have stopped, since the last step
        self.evictions = 0  # by the one that runs, until the last step
        self.evicted_on_purpose: set[str] = set()  # evicted on purpose in this step

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the event loop until this is done."""
        return self.runner.run(work)

    @initialize()
    def start(self) -> None:
        self.gcs = GCSServer()
        self.run(self.gcs.start())
        for name in ITEMS:
            self.overwrite(name, 200)
        self.start_daemon(self.folder / "life-0")

    def start_daemon(self, cache_dir: Path) -> None:
        """Start a daemon in a new directory, or in one that another daemon left."""
        options = make_settings(
            cache_dir,
            self.gcs.url,
            cache_size=LIMIT_BYTES,
            deadline_s=0.3,
            fetch_processes=self.fetch_processes,
            log_level="error",
        )
        self.daemon = Daemon(options, lambda: None)
        self.stack = AsyncExitStack()
        self.run(self.stack.enter_async_context(self.daemon.running()))
        self.client = DaemonClient(cache_dir)
        self.evictions = 0

    def stop_daemon(self) -> None:
        self.client.close()
        self.run(self.stack.aclose())
        self.evicted += self.daemon.cache.evictions - self.evictions

    async def call_in_thread(self, call: Any, *arguments: Any) -> Any:
        """Call the client in a thread: it blocks, and the daemon that responds runs in this loop."""
        return await asyncio.to_thread(call, *arguments)

    @rule(name=names, size=sizes)
    def overwrite(self, name: str, size: int) -> None:
        data = content(next(self.numbers), size)
        generation = self.gcs.put(BUCKET, name, data).generation
        self.generations[name][generation] = data
        self.live[name] = generation
        self.allowed[name].add(generation)

    @rule(name=names)
    def delete(self, name: str) -> None:
        self.gcs.delete(BUCKET, name)
        self.live.pop(name, None)

    @rule(fault=st.sampled_from(FAULTS), kinds=st.sampled_from([[Kind.MEDIA], [Kind.LIST], [Kind.MEDIA, Kind.LIST]]))
    def fail(self, fault: Fault, kinds: list[Kind]) -> None:
        for kind in kinds:
            self.gcs.faults.add(fault, kind=kind)
        self.failing = True

    @precondition(lambda self: self.failing)
    @rule()
    def recover(self) -> None:
        self.gcs.faults.clear()
        self.run(self.settle())
        self.failing = False

    @rule(wanted=st.lists(names, min_size=1, max_size=3, unique=True))
    def read(self, wanted: list[str]) -> None:
        """Read as readers without a manifest do: the file, or after a demand; all of them at once."""
        was_free = not self.running_work()
        for name, data in zip(wanted, self.run(self.read_all(wanted)), strict=True):
            self.tally.repetitions += 1
            if isinstance(data, bytes):
                allowed = {self.generations[name][generation] for generation in self.allowed[name]}
                self.tally.wrong_bytes += data not in allowed
                assert data in allowed, f"{name}: none of {sorted(self.allowed[name])}"
            else:
                self.tally.failed_reads += 1
                lacks_space = "no space" in data and (len(wanted) > 1 or not was_free)
                assert self.failing or name not in self.live or lacks_space, data

    async def read_all(self, wanted: list[str]) -> list[bytes | str]:
        return await asyncio.gather(*map(self.read_one, wanted))

    async def read_one(self, name: str) -> bytes | str:
        data = self.cached(name)
        if data is None:
            error = await asyncio.to_thread(self.demand, name)
            if error:
                return error
            data = self.cached(name)
        return "evicted before it was read" if data is None else data

    def demand(self, name: str) -> str:
        with closing(DaemonClient(self.client.cache_dir)) as client:  # readers that demand at once are several processes
            return client.fetch([f"gs://{BUCKET}/{name}"])[0]

    def cached(self, name: str) -> bytes | None:
        return read_checked(self.objects, cache_path(BUCKET, name))

    @property
    def objects(self) -> Path:
        return self.daemon.directory.objects

    @rule()
    def relist(self) -> None:
        listed = dict(self.live)
        try:
            self.run(self.daemon.bucket_sync.relist(ROOT))
        except PrefetchdError:
            items = [f"train/{part}" for item in "abc" for part in (f"images/{item}.jpg", f"labels/{item}.png")]
            pairs = zip(items[::2], items[1::2], strict=True)
            assert self.failing or not any(image in listed and label in listed for image, label in pairs)
            return
        self.apply_listing(listed)

    def apply_listing(self, listed: dict[str, int]) -> None:
        manifest = self.daemon.registry.catalog.newest_manifest(DATA_ROOT)
        assert manifest is not None
        for version in (version for item in range(len(manifest)) for version in manifest.versions(item)):
            name = version.name.name
            if name in listed:
                assert version.generation == listed[name]
                self.allowed[name] = {listed[name]}

    @rule(name=names)
    def evict(self, name: str) -> None:
        self.evicted_on_purpose.add(name)
        self.run(self.daemon.cache.evict(cache_path(BUCKET, name)))

    @rule(name=names)
    def remove_by_hand(self, name: str) -> None:
        self.evicted_on_purpose.add(name)
        (self.objects / cache_path(BUCKET, name)).unlink(missing_ok=True)
        self.run(self.daemon.cache.rescan())

    @rule(seed=st.integers(0, 3), kind=st.sampled_from(["shuffled", "endless"]), job=st.sampled_from(["one", "other"]))
    def plan(self, seed: int, kind: str, job: str) -> None:
        self.run(self.call_in_thread(self.send_plan, seed, kind, job))

    def send_plan(self, seed: int, kind: str, job: str) -> None:
        manifest = load_manifest(Path(self.client.manifest(DATA_ROOT).path))
        indices = np.arange(len(manifest), dtype=np.uint32)
        order = plan_order(kind, seed, 0, indices)
        plan = Plan(
            job=job, stream=job, data_root=DATA_ROOT, manifest=manifest.digest, kind=kind, seed=seed, epoch=0, position=0,
            rank=0, world=1, drop_last=0, start=0, digest=order_digest(order),
        )  # fmt: skip
        self.client.send_plan(plan, pack_indices(indices.tolist()))

    @rule(job=st.sampled_from(["one", "other", "unknown"]), read=st.lists(names, max_size=4))
    def report_reads(self, job: str, read: list[str]) -> None:
        report = ReadReport(job, job, next(self.numbers), len(read), 0, 0, 0.0, [f"gs://{BUCKET}/{name}" for name in read])
        self.run(self.call_in_thread(self.client.report_reads, report))

    @rule()
    def restart(self) -> None:
        cache_dir = self.client.cache_dir
        self.stop_daemon()
        self.start_daemon(cache_dir)

    @rule()
    def kill(self) -> None:
        """A SIGKILL leaves what the disk holds at this moment; the killed daemon does not touch the copy."""
        left, copy = self.client.cache_dir, self.folder / f"life-{next(self.numbers)}"
        copy_as_it_is(left, copy)
        self.stop_daemon()
        shutil.rmtree(left)
        self.start_daemon(copy)
        self.run(self.daemon.cache.wait_until_ready())

    @rule()
    def wait(self) -> None:
        self.run(self.settle())

    def running_work(self) -> set[asyncio.Task[Any]]:
        tasks = asyncio.all_tasks(self.runner.get_loop())
        return {task for task in tasks if task.get_name().startswith(("fetch ", "unlink", "recovery"))}

    async def settle(self) -> None:
        """Wait until nothing is being downloaded or evicted."""
        while tasks := self.running_work():
            await asyncio.wait(tasks)
            await asyncio.sleep(0)

    async def problems(self) -> list[str]:
        """The problems that the cache finds in itself while nothing is downloaded or evicted."""
        while True:
            await self.settle()
            before = self.changes()
            problems = await self.daemon.cache.check()
            if before == self.changes() and not self.running_work():
                return problems

    def changes(self) -> tuple[int, ...]:
        daemon = self.daemon
        return daemon.fetcher.downloaded.demand, daemon.fetcher.downloaded.prefetch, daemon.cache.evictions, len(daemon.cache)

    # Hypothesis runs invariants in the order of their names. The first two must follow each other: the last one runs the event
    # loop, and what is evicted in between would count for the wrong step.

    @invariant()
    def every_file_is_one_generation(self) -> None:
        self.cached_now = {}
        for name in self.generations:
            path = cache_path(BUCKET, name)
            data = self.cached(name)
            if data is not None:
                stamp = read_stamp(self.objects / path, path)
                if stamp is None:
                    continue  # evicted between the two reads
                assert self.generations[name][stamp.generation] == data
                if (
                    not self.daemon.cache.is_ready or self.daemon.cache.stamp(path) == stamp
                ):  # otherwise it is about to be evicted
                    self.cached_now[name] = stamp.generation

    @invariant()
    def the_bound_holds(self) -> None:
        cache = self.daemon.cache
        assert cache.bytes + cache.capacity.reserved_bytes <= LIMIT_BYTES
        assert sum(path.stat().st_size for path in self.objects.rglob("*") if path.is_file()) <= LIMIT_BYTES

    @invariant()
    def objects_disappear_only_by_eviction(self) -> None:
        gone = {
            name for name, generation in self.cached_before.items() if self.is_right(name, generation)
        } - self.cached_now.keys()
        evicted = self.evicted + self.daemon.cache.evictions - self.evictions
        self.tally.lost_objects += max(0, len(gone - self.evicted_on_purpose) - evicted)
        assert len(gone - self.evicted_on_purpose) <= evicted, gone
        self.cached_before, self.evicted, self.evictions, self.evicted_on_purpose = (
            self.cached_now,
            0,
            self.daemon.cache.evictions,
            set(),
        )

    def is_right(self, name: str, generation: int) -> bool:
        """Whether it is the generation in the bucket, and no older listing contradicts it."""
        listed = self.daemon.registry.catalog.newest_version(ObjectName(BUCKET, name))
        return self.live.get(name) == generation and (listed is None or listed.generation == generation)

    @invariant()
    def the_memory_index_and_the_disk_agree(self) -> None:
        if not self.running_work():
            assert self.run(self.problems()) == []

    def teardown(self) -> None:
        if hasattr(self, "daemon"):
            self.gcs.faults.clear()
            assert self.run(self.problems()) == []
            self.stop_daemon()
            self.run(self.gcs.stop())
        self.runner.close()
        shutil.rmtree(self.folder)


def copy_as_it_is(folder: Path, copy: Path) -> None:
    """Copy a directory with its files' stamps, while threads may still write there."""
    for path in [folder, *folder.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                (copy / path.relative_to(folder)).mkdir(mode=0o750)
            elif path.is_file():
                shutil.copy2(path, copy / path.relative_to(folder))


SEQUENCES = settings(deadline=None, stateful_step_count=30, suppress_health_check=list(HealthCheck))


def test_after_any_operations_reads_return_what_the_model_allows() -> None:
    """The same few sequences of operations in every run; `make torture` draws others."""
    run_state_machine_as_test(Model, settings=settings(SEQUENCES, max_examples=12, derandomize=True))


class WithFetchProcesses(Model):
    """They start with the first prefetch of each daemon, and may be killed in any step."""

    fetch_processes = 2

    @rule()
    def kill_fetch_processes(self) -> None:
        assert self.daemon.fetch_processes is not None
        for pid in self.daemon.fetch_processes.pids:
            os.kill(pid, signal.SIGKILL)


def test_after_any_operations_with_fetch_processes_reads_return_what_the_model_allows() -> None:
    run_state_machine_as_test(WithFetchProcesses, settings=settings(SEQUENCES, max_examples=5, derandomize=True))


@pytest.mark.torture
def test_after_many_sequences_of_operations_reads_return_what_the_model_allows(tally: Tally) -> None:
    for model in (Model, WithFetchProcesses):
        counted = type("Counted", (model,), {"tally": tally})
        run_state_machine_as_test(counted, settings=settings(SEQUENCES, max_examples=20, database=None))
