"""The errors of gcs-prefetchd: one tree, each made from one string that names the object or the setting."""

__all__ = [
    "AccessDeniedError",
    "CacheDirectoryError",
    "CacheFullError",
    "CacheHeldError",
    "CacheWriteError",
    "CredentialsError",
    "DaemonUnavailableError",
    "InvalidNameError",
    "ItemError",
    "ManifestError",
    "ObjectChangedError",
    "ObjectMissingError",
    "OriginError",
    "OriginUnavailableError",
    "PrefetchdError",
    "ProtocolError",
    "SettingsError",
    "StartError",
    "WrongBytesError",
]


class PrefetchdError(Exception):
    """Base of every error that gcs_prefetchd and gcs_dataset raise.

    Takes ONE string: torch re-raises a worker's error as `type(error)(message)` and loses any other kind.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)


class SettingsError(PrefetchdError):
    """A setting is unknown or has a value that cannot be used."""


class StartError(PrefetchdError):
    """The daemon could not start."""


class InvalidNameError(PrefetchdError):
    """A bucket, object or data root has a name that GCS does not allow."""


class ManifestError(PrefetchdError):
    """A manifest is missing, damaged or of another data root."""


class ItemError(PrefetchdError):
    """An item lacks a part, or a part is no image."""


class ProtocolError(PrefetchdError):
    """A message between a reader and the daemon has a field that cannot be used."""


class DaemonUnavailableError(PrefetchdError):
    """The daemon is absent, did not answer in time, or answered with something else."""


class CacheDirectoryError(PrefetchdError):
    """The cache directory cannot be used: not a directory, not writable, or not ours."""


class CacheHeldError(CacheDirectoryError):
    """Another daemon holds the cache directory."""


class CacheFullError(PrefetchdError):
    """There is no room for an object within the size bound and the free-space floor."""


class CacheWriteError(PrefetchdError):
    """The cache's disk refused a write."""


class OriginError(PrefetchdError):
    """Base of what can go wrong between us and GCS."""


class ObjectMissingError(OriginError):
    """GCS returned 404: the object or the bucket does not exist. Final."""


class AccessDeniedError(OriginError):
    """GCS returned 403: these credentials may not read it. Final."""


class CredentialsError(OriginError):
    """There are no credentials, they cannot be read, or GCS returned 401. Final."""


class ObjectChangedError(OriginError):
    """The generation asked for is no longer the object's. Final for that generation."""


class OriginUnavailableError(OriginError):
    """GCS could not be reached, or answered with failures until the deadline."""


class WrongBytesError(OriginError):
    """What arrived is not the object: its size, crc32c or generation differs."""
