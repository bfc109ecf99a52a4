"""The patterns of an item's parts: object names in a data root from item ids, and back. Pure."""

from dataclasses import dataclass
from functools import lru_cache

from gcs_prefetchd.shared.errors import SettingsError

__all__ = ["IMAGE_PATTERN", "LABEL_PATTERN", "ItemPatterns"]

IMAGE_PATTERN = "images/{id}.jpg"
LABEL_PATTERN = "labels/{id}.png"


@dataclass(frozen=True, slots=True)
class ItemPatterns:
    """One pattern with `{id}` for each part of an item, images first. Names are relative to the data root."""

    patterns: tuple[str, ...] = (IMAGE_PATTERN, LABEL_PATTERN)

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if pattern.count("{id}") != 1:
                raise SettingsError(f"pattern {pattern!r} must contain {{id}} once, as in {IMAGE_PATTERN!r}")
        if len(set(self.patterns)) != len(self.patterns):
            raise SettingsError(f"pattern {self.patterns[0]!r} is used for both the image and the label")

    def part_name(self, item_id: str, part: int) -> str:
        """The object's name below the data root."""
        before, after = self.patterns[part].split("{id}")
        return f"{before}{item_id}{after}"

    def match(self, name: str) -> tuple[str, int] | None:
        """The id and the part of the object with this name (below the data root), or None."""
        for part, before, after in _most_specific_first(self.patterns):
            if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
                return name[len(before) : len(name) - len(after)], part
        return None

    def folders(self) -> list[str]:
        """The prefixes (below the data root) whose listings contain every part; none is within another."""
        starts = sorted({pattern.split("{id}")[0] for pattern in self.patterns})
        return [start for start in starts if not any(start != other and start.startswith(other) for other in starts)]


@lru_cache
def _most_specific_first(patterns: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Each part with the text before and after its id.

    `7_mask.png` matches both `{id}.png` and `{id}_mask.png`: the more specific pattern is used.
    """
    parts = [(part, *pattern.partition("{id}")[::2]) for part, pattern in enumerate(patterns)]
    return sorted(parts, key=lambda part: -len(part[1] + part[2]))
