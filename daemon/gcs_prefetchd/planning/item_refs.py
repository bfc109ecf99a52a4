"""References to items and their parts. An item is named by its data root and its number there. Pure."""

from typing import NamedTuple

__all__ = ["ItemRef", "PartRef"]

# Tuples and not dataclasses: made for every read, and compared with plain tuples where creating one costs too much.


class ItemRef(NamedTuple):
    """An item of a data root."""

    data_root: str
    item: int


class PartRef(NamedTuple):
    """A part of an item."""

    data_root: str
    item: int
    part: int

    @property
    def item_ref(self) -> ItemRef:
        """The item that the part belongs to."""
        return ItemRef(self.data_root, self.item)
