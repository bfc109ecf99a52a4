"""GCS clients for tests, and an object for them to list and download."""

import contextlib

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.checked_read import crc32c_of
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.testing import Fault, GCSServer, Status

BUCKET = "pictures"
DATA = bytes(range(256)) * 20
NAME = ObjectName(BUCKET, "train/images/00007.jpg")
KEY = f"{BUCKET}/{NAME.name}"


def make_client(
    gcs: GCSServer, *, deadline_s: float = 20.0, connections: int = 128, user_project: str | None = None
) -> GCSClient:
    """An anonymous client whose attempts give up after 0.2 s of silence."""
    access = Access(gcs.url, anonymous=True, user_project=user_project)
    return GCSClient(access, deadline_s=deadline_s, connections=connections, read_timeout_s=0.2)


def put(gcs: GCSServer, data: bytes = DATA, name: ObjectName = NAME) -> ObjectVersion:
    """Store the object and return the version that a listing would name."""
    stored = gcs.put(name.bucket, name.name, data)
    return ObjectVersion(name, stored.generation, len(data), crc32c_of(data))


async def list_all(client: GCSClient, prefix: str = "train/") -> list[ObjectVersion]:
    """The versions of all objects below the prefix, sorted by name."""
    async with contextlib.aclosing(client.list(BUCKET, prefix)) as pages:
        versions = [version async for page in pages for version in page.versions(BUCKET)]
    return sorted(versions, key=lambda version: version.name)


def json_response(body: str, status: int = 200) -> Status:
    """A fault that replaces the response by this JSON."""
    return Status(status, body=body, content_type="application/json")


def fault_id(fault: Fault) -> str:
    """A short id for a parametrized fault."""
    return repr(fault)[:60]
