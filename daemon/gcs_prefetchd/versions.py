"""One generation of an object: what a listing or an answer says that its bytes are."""

from dataclasses import dataclass

from gcs_prefetchd.names import ObjectName

__all__ = ["ObjectVersion"]


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One generation of an object, as a listing or a response names it. `crc32c` is None where GCS told none."""

    name: ObjectName
    generation: int
    size: int
    crc32c: int | None
