"""What one process read, told to the daemon in batches by a thread, so that no read waits for a report."""

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

__all__ = ["ReadReporter", "Reads"]

SHORTEST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0  # while the daemon is away; counts of that time arrive this long after it is back
SEND_TIMEOUT_S = 5.0
LAST_SEND_TIMEOUT_S = 1.0  # a process that ends does not wait longer for its last report


@dataclass(slots=True)
class Reads:
    """How reads went: from disk, through the daemon, straight from GCS; and what the last two took."""

    hits: int = 0
    misses: int = 0
    fallbacks: int = 0
    wait_s: float = 0.0

    def add(self, other: "Reads") -> None:
        """Count the others too."""
        self.hits += other.hits
        self.misses += other.misses
        self.fallbacks += other.fallbacks
        self.wait_s += other.wait_s


class ReadReporter:
    """Collects reads and reports them, at most every 0.25 s while there are any, and once more when the process ends.

    Belongs to the process that made it. A report that was not answered may have arrived: it is sent again as it was until it
    is. Meanwhile the counts of what is read are kept, and the names of the latest 10,000 objects with them.
    """

    def __init__(self, cache_dir: Path, job: str) -> None:
        self._cache_dir = cache_dir
        self._job = job
        self._lock = threading.Lock()
        self._reads = Reads()
        self._uris: deque[str] = deque(maxlen=MAX_OBJECTS_PER_MESSAGE)
        self._id = uuid.uuid4().hex
        self._number = 0
        self._unanswered: ReadReport | None = None
        self._something = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._at_exit: Finalize | None = None

    def add(self, reads: Reads, uris: Sequence[str]) -> None:
        """Count these reads. Takes a few microseconds."""
        with self._lock:
            self._reads.add(reads)
            self._uris.extend(uris)
            if self._thread is None and not self._closing.is_set():
                self._start()
        if not self._something.is_set():
            self._something.set()

    def close(self) -> None:
        """Report what is left, for a second at most, and end the thread."""
        self.end_soon()
        if self._thread is not None:
            self._thread.join(2 * LAST_SEND_TIMEOUT_S)

    def end_soon(self) -> None:
        """Have the thread report what is left and end; does not wait for it."""
        self._closing.set()
        self._something.set()

    def _start(self) -> None:
        # DataLoader's workers leave through multiprocessing's finalizers and never reach atexit; the main process runs both.
        self._at_exit = Finalize(None, self.close, exitpriority=10)
        self._thread = threading.Thread(target=self._run, name="gcs-dataset-reports", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client = DaemonClient(self._cache_dir, SEND_TIMEOUT_S)
        pause_s = SHORTEST_PAUSE_S
        while not self._closing.is_set():
            self._something.wait()
            if self._closing.is_set():
                break
            if self._send(client):
                pause_s = SHORTEST_PAUSE_S
            else:
                # The client would pause for longer than reports should; a new one costs an open() while nobody is there.
                client.close()
                client = DaemonClient(self._cache_dir, SEND_TIMEOUT_S)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self._closing.wait(pause_s)
        client.close()
        client = DaemonClient(self._cache_dir, LAST_SEND_TIMEOUT_S)
        self._send(client)
        client.close()
        if self._at_exit is not None:
            self._at_exit.cancel()

    def _send(self, client: DaemonClient) -> bool:
        """Report what there is; where that fails it stays for the next time."""
        if self._unanswered is not None and not self._deliver(client, self._unanswered):
            return False
        report = self._gather()
        return report is None or self._deliver(client, report)

    def _gather(self) -> ReadReport | None:
        with self._lock:
            reads, uris = self._reads, list(self._uris)
            self._reads = Reads()
            self._uris.clear()
            self._something.clear()
        if not uris and not (reads.hits or reads.misses or reads.fallbacks):
            return None
        self._number += 1
        return ReadReport(self._job, self._id, self._number, reads.hits, reads.misses, reads.fallbacks, reads.wait_s, uris)

    def _deliver(self, client: DaemonClient, report: ReadReport) -> bool:
        self._unanswered = report
        try:
            client.report_reads(report)
        except ProtocolError:
            # A report that the daemon refuses must not hold up those after it: the counts go with the next one.
            self._unanswered = None
            with self._lock:
                self._reads.add(Reads(report.hits, report.misses, report.fallbacks, report.wait_s))
        except PrefetchdError:
            pass  # the next time; the readers say that there is no daemon
        else:
            self._unanswered = None
            return True
        self._something.set()
        return False
