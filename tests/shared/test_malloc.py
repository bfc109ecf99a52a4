"""glibc's malloc keeps freed memory until a call returns it."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os
from gcs_prefetchd.shared.malloc import keep_freed_memory, return_freed_memory

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

keep_freed_memory()
blocks = [bytearray(b"x" * (1 << 20)) for _ in range(100)]
used = resident_bytes()
del blocks
kept = resident_bytes()
return_freed_memory()
print(used - kept, kept - resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings exist in glibc only")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    freed_at_once, returned = map(int, result.stdout.split())
    assert freed_at_once < 10 << 20
    assert returned > 80 << 20
