"""Where the parts of an item lie in a data root. Pure."""

from dataclasses import dataclass
from functools import lru_cache

from gcs_prefetchd.shared.errors import SettingsError

__all__ = ["IMAGE_PATTERN", "LABEL_PATTERN", "ItemPatterns"]

IMAGE_PATTERN = "images/{id}.jpg"
LABEL_PATTERN = "labels/{id}.png"


@dataclass(frozen=True, slots=True)
class ItemPatterns:
    """Where the parts of an item lie below the data root: one pattern with `{id}` for each part, images first."""

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
        """The id and the part that the name (below the data root) stands for, or None."""
        for part, before, after in _most_telling_first(self.patterns):
            if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
                return name[len(before) : len(name) - len(after)], part
        return None

    def folders(self) -> list[str]:
        """The prefixes (below the data root) whose listings hold every part; none lies within another."""
        starts = sorted({pattern.split("{id}")[0] for pattern in self.patterns})
        return [start for start in starts if not any(start != other and start.startswith(other) for other in starts)]


@lru_cache
def _most_telling_first(patterns: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Each part and what stands before and after its id.

    `7_mask.png` fits both `{id}.png` and `{id}_mask.png`: the pattern that says more of it is meant.
    """
    parts = [(part, *pattern.partition("{id}")[::2]) for part, pattern in enumerate(patterns)]
    return sorted(parts, key=lambda one: -len(one[1] + one[2]))
