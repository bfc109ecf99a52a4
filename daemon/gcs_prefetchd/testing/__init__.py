"""A GCS-speaking server with counts, latency and faults: for the project's tests and demos, and for users' own tests.

In an async test `async with GCSServer() as server:`, in any other `with serving() as server:`, and on the command
line `python -m gcs_prefetchd.testing --root DIR --port 4443`.
"""

from gcs_prefetchd.testing.counters import Counts, Kind
from gcs_prefetchd.testing.faults import (
    Close,
    Cut,
    Drip,
    EmptyBody,
    Fault,
    FaultPlan,
    FlippedByte,
    HtmlPage,
    LongBody,
    MalformedHash,
    MissingHash,
    Partial,
    Reset,
    Rule,
    Stall,
    Status,
    WrongGeneration,
)
from gcs_prefetchd.testing.latency import Pace
from gcs_prefetchd.testing.server import GCSServer, Seen
from gcs_prefetchd.testing.server_thread import ServingGCS, serving
from gcs_prefetchd.testing.stored_objects import StoredObject

__all__ = [
    "Close",
    "Counts",
    "Cut",
    "Drip",
    "EmptyBody",
    "Fault",
    "FaultPlan",
    "FlippedByte",
    "GCSServer",
    "HtmlPage",
    "Kind",
    "LongBody",
    "MalformedHash",
    "MissingHash",
    "Pace",
    "Partial",
    "Reset",
    "Rule",
    "Seen",
    "ServingGCS",
    "Stall",
    "Status",
    "StoredObject",
    "WrongGeneration",
    "serving",
]
