"""Reports what one process reads to the daemon, in batches and from a thread, so that no read waits for a report."""

import threading
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path

from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.errors import PrefetchdError, ProtocolError
from gcs_prefetchd.shared.messages import MAX_OBJECTS_PER_MESSAGE, ReadReport

__all__ = ["ReadCounts", "ReadReporter"]

SHORTEST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0  # while the daemon is absent; its first report arrives this long after it is back
SEND_TIMEOUT_S = 5.0
LAST_SEND_TIMEOUT_S = 1.0  # an exiting process waits no longer than this for its last report


@dataclass(slots=True)
class ReadCounts:
    """How many objects were read from disk, through the daemon and directly from GCS; and how long the last two took."""

    hits: int = 0
    misses: int = 0
    fallbacks: int = 0
    wait_s: float = 0.0

    def add(self, other: "ReadCounts") -> None:
        """Add the other counts."""
        self.hits += other.hits
        self.misses += other.misses
        self.fallbacks += other.fallbacks
        self.wait_s += other.wait_s


class ReadReporter:
    """Collects reads and reports them, at most every 0.25 s while there are any, and once more when the process exits.

    Belongs to the process that created it. A report without a response may have arrived: it is sent again unchanged until the
    daemon responds. Meanwhile the counts of later reads are kept, with the names of the latest 10,000 objects.
    """

    def __init__(self, cache_dir: Path, job: str) -> None:
        self._cache_dir = cache_dir
        self._job = job
        self._lock = threading.Lock()
        self._counts = ReadCounts()
        self._uris: deque[str] = deque(maxlen=MAX_OBJECTS_PER_MESSAGE)
        self._id = uuid.uuid4().hex
        self._last_number = 0
        self._unconfirmed: ReadReport | None = None
        self._wakeup = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._at_exit: Finalize | None = None

    def add(self, counts: ReadCounts, uris: Sequence[str]) -> None:
        """Add reads to the next report. Takes a few microseconds."""
        with self._lock:
            self._counts.add(counts)
            self._uris.extend(uris)
            if self._thread is None and not self._stopping.is_set():
                self._start()
        if not self._wakeup.is_set():
            self._wakeup.set()

    def close(self) -> None:
        """Send the last report, for a second at most, and stop the thread."""
        self.request_stop()
        if self._thread is not None:
            self._thread.join(2 * LAST_SEND_TIMEOUT_S)

    def request_stop(self) -> None:
        """Let the thread send the last report and stop; does not wait for it."""
        self._stopping.set()
        self._wakeup.set()

    def _start(self) -> None:
        # DataLoader's workers exit through multiprocessing's finalizers and never reach atexit; the main process runs both.
        self._at_exit = Finalize(None, self.close, exitpriority=10)
        self._thread = threading.Thread(target=self._run, name="gcs-dataset-reports", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client = DaemonClient(self._cache_dir, SEND_TIMEOUT_S)
        pause_s = SHORTEST_PAUSE_S
        while not self._stopping.is_set():
            self._wakeup.wait()
            if self._stopping.is_set():
                break
            if self._send(client):
                pause_s = SHORTEST_PAUSE_S
            else:
                # The client would pause for longer than reports should; a new one costs one open() while the daemon is absent.
                client.close()
                client = DaemonClient(self._cache_dir, SEND_TIMEOUT_S)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self._stopping.wait(pause_s)
        client.close()
        client = DaemonClient(self._cache_dir, LAST_SEND_TIMEOUT_S)
        self._send(client)
        client.close()
        if self._at_exit is not None:
            self._at_exit.cancel()

    def _send(self, client: DaemonClient) -> bool:
        """Send the report that is due; one that fails is kept for the next time."""
        if self._unconfirmed is not None and not self._deliver(client, self._unconfirmed):
            return False
        report = self._take_report()
        return report is None or self._deliver(client, report)

    def _take_report(self) -> ReadReport | None:
        with self._lock:
            counts, uris = self._counts, list(self._uris)
            self._counts = ReadCounts()
            self._uris.clear()
            self._wakeup.clear()
        if not uris and not (counts.hits or counts.misses or counts.fallbacks):
            return None
        self._last_number += 1
        return ReadReport(
            self._job, self._id, self._last_number, counts.hits, counts.misses, counts.fallbacks, counts.wait_s, uris
        )

    def _deliver(self, client: DaemonClient, report: ReadReport) -> bool:
        self._unconfirmed = report
        try:
            client.report_reads(report)
        except ProtocolError:
            # A report that the daemon rejects must not block those after it: its counts go into the next one.
            self._unconfirmed = None
            with self._lock:
                self._counts.add(ReadCounts(report.hits, report.misses, report.fallbacks, report.wait_s))
        except PrefetchdError:
            pass  # retried the next time; the readers log that there is no daemon
        else:
            self._unconfirmed = None
            return True
        self._wakeup.set()
        return False
