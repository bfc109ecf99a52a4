"""Settings of glibc's malloc: keep the memory of images instead of mapping and unmapping it each time."""

import ctypes

__all__ = ["keep_freed_memory", "return_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Serve blocks of up to 32 MiB from the heap, and keep up to 256 MiB of it when freed.

    By default each body and each decoded image of at least 128 KiB costs two system calls and its page faults. Does
    nothing with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def return_freed_memory() -> None:
    """Return freed memory to the system. Takes milliseconds: call it after work that is not repeated soon."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
