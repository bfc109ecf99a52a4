"""The state of each path of a cache, and which states may follow it. Pure.

    ABSENT ---> PUBLISHING ---> CACHED ---> UNLINKING ---> ABSENT

A path at rest is CACHED if the memory index has an entry for it, else ABSENT. Only paths in transition are stored here, so a
cache of millions of files pays for the few that change.
"""

from collections.abc import Callable
from enum import Enum, auto

__all__ = ["ALLOWED", "PathState", "PathStates"]


class PathState(Enum):
    """What happens to a path. While a file is published, an older one stays in its place and is neither evicted nor adopted."""

    ABSENT = auto()  # no file, or none that the cache knows of
    CACHED = auto()  # a complete file, with an entry in the index
    PUBLISHING = auto()  # a new file is about to be renamed to the path
    PUBLISHING_OR_EVICTING = auto()  # as above, and the older file is evicted if no new one is published
    UNLINKING = auto()  # evicted: its entry is gone, and a thread removes the file


ALLOWED: dict[PathState, frozenset[PathState]] = {
    PathState.ABSENT: frozenset(
        {
            PathState.CACHED,  # found in the index or on the disk
            PathState.PUBLISHING,
            PathState.UNLINKING,  # found on the disk with a wrong length
        }
    ),
    PathState.CACHED: frozenset(
        {
            PathState.ABSENT,  # deleted by hand
            PathState.CACHED,  # another file was found in its place
            PathState.PUBLISHING,
            PathState.UNLINKING,
        }
    ),
    PathState.PUBLISHING: frozenset(
        {
            PathState.ABSENT,  # not published
            PathState.CACHED,  # published; or not published, and the older file stays
            PathState.PUBLISHING_OR_EVICTING,
        }
    ),
    PathState.PUBLISHING_OR_EVICTING: frozenset(
        {
            PathState.ABSENT,  # not published, and the older file was deleted by hand
            PathState.CACHED,
            PathState.PUBLISHING_OR_EVICTING,  # evicted twice
            PathState.UNLINKING,  # not published
        }
    ),
    PathState.UNLINKING: frozenset(
        {
            PathState.ABSENT,
            PathState.CACHED,  # the file cannot be unlinked: it still uses space
        }
    ),
}
FROM_REST = ALLOWED[PathState.ABSENT] | ALLOWED[PathState.CACHED]


class PathStates:
    """The states of all paths. `is_cached` returns whether a path has an entry in the memory index."""

    def __init__(self, is_cached: Callable[[str], bool]) -> None:
        self._is_cached = is_cached
        self._in_transition: dict[str, PathState] = {}

    def state(self, path: str) -> PathState:
        """The path's state."""
        if (state := self._in_transition.get(path)) is not None:
            return state
        return PathState.CACHED if self._is_cached(path) else PathState.ABSENT

    def move(self, path: str, state: PathState) -> None:
        """Put the path into a state, which must be allowed. The caller changes the path's entry to match."""
        before = self._in_transition.get(path)
        # For a path at rest the two states are not distinguished: that would cost each publication a look into the index.
        allowed = FROM_REST if before is None else ALLOWED[before]
        if state not in allowed:
            raise AssertionError(f"{path}: {before and before.name} -> {state.name}")
        if state is PathState.CACHED or state is PathState.ABSENT:
            self._in_transition.pop(path, None)
        else:
            self._in_transition[path] = state

    def is_in_transition(self, path: str) -> bool:
        """Whether the path's file is about to change."""
        return path in self._in_transition

    def is_publishing(self, path: str) -> bool:
        """Whether a file is about to be published at the path."""
        state = self._in_transition.get(path)
        return state is PathState.PUBLISHING or state is PathState.PUBLISHING_OR_EVICTING

    def unlinking(self) -> list[str]:
        """The paths whose files are being removed."""
        return [path for path, state in self._in_transition.items() if state is PathState.UNLINKING]
