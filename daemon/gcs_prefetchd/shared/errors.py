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
    """A setting is unknown or its value is not valid."""


class StartError(PrefetchdError):
    """The daemon could not start."""


class InvalidNameError(PrefetchdError):
    """GCS does not allow the name of a bucket, an object or a data root."""


class ManifestError(PrefetchdError):
    """A manifest is missing, damaged or belongs to another data root."""


class ItemError(PrefetchdError):
    """An item lacks a part, or a part is not an image."""


class ProtocolError(PrefetchdError):
    """A field of a message between a reader and the daemon is not valid."""


class DaemonUnavailableError(PrefetchdError):
    """The daemon is absent, did not respond in time, or sent an unusable response."""


class CacheDirectoryError(PrefetchdError):
    """The cache directory cannot be used: not a directory, not writable, or not ours."""


class CacheHeldError(CacheDirectoryError):
    """Another daemon holds the cache directory."""


class CacheFullError(PrefetchdError):
    """There is no space for an object within the size limit and the free-space floor."""


class CacheWriteError(PrefetchdError):
    """The cache's disk refused a write."""


class OriginError(PrefetchdError):
    """Base of all errors between the daemon, or a reader, and GCS."""


class ObjectMissingError(OriginError):
    """GCS returned 404: the object or the bucket does not exist. Final."""


class AccessDeniedError(OriginError):
    """GCS returned 403: these credentials may not read it. Final."""


class CredentialsError(OriginError):
    """There are no credentials, they cannot be read, or GCS returned 401. Final."""


class ObjectChangedError(OriginError):
    """The requested generation is no longer the object's. Final for that generation."""


class OriginUnavailableError(OriginError):
    """GCS could not be reached, or its responses were failures until the deadline."""


class WrongBytesError(OriginError):
    """The received bytes are not the object: size, crc32c or generation differ."""
