"""Parses and formats sizes with units: `200GB`, `1.5TiB`, `500M`."""

import re
from decimal import Decimal

__all__ = ["format_exact_size", "format_size", "parse_size"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)")


def parse_size(value: object) -> int:
    """The number of bytes; raises ValueError with what to write instead.

    Accepts a number and a unit, or a whole number of bytes. pydantic's ByteSize would also accept `500MB/s` and True.
    """
    match = _SIZE.fullmatch(str(value).strip())
    unit_bytes = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit_bytes is None or (unit_bytes == 1 and Decimal(match[1]) % 1):
        raise ValueError("is not a valid size; write a number and a unit, as in 200GB or 1.5TiB")
    return int(Decimal(match[1]) * unit_bytes)


def format_size(size_bytes: float) -> str:
    """The size in the largest unit of 1,000 that leaves at least 1 of it: `1.5 GB`."""
    value = float(size_bytes)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(value) < 999.5:  # which rounds to 1,000
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} PB"


def format_exact_size(size_bytes: int) -> str:
    """The size to the byte, in the largest unit of 1,000 that leaves at least 1 of it: `1.048576 MB`."""
    unit, unit_bytes = "B", 1
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if size_bytes < 1000 * unit_bytes:
            break
        unit, unit_bytes = larger, 1000 * unit_bytes
    whole, rest = divmod(size_bytes, unit_bytes)
    decimals = f"{rest:0{len(str(unit_bytes)) - 1}}".rstrip("0") if rest else ""
    return f"{whole}.{decimals} {unit}" if decimals else f"{whole} {unit}"
