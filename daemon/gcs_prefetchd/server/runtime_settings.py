"""The settings that can be changed while the daemon runs, and the download slots that they apply to."""

import json
import logging
import time
from collections.abc import Callable, Mapping

from gcs_prefetchd.fetch.adaptive_concurrency import AdaptiveConcurrency
from gcs_prefetchd.fetch.download_slots import DownloadSlots
from gcs_prefetchd.fetch.rate_limit import RateLimit
from gcs_prefetchd.settings import Settings, change_settings, format_value
from gcs_prefetchd.shared.errors import ProtocolError, SettingsError

__all__ = ["CHANGEABLE", "RuntimeSettings", "make_slots"]

log = logging.getLogger(__name__)

CHANGEABLE = ("concurrency", "min_concurrency", "max_requests_per_s", "max_bytes_per_s")
SIZES = ("max_bytes_per_s",)

Value = int | float | None


def make_slots(settings: Settings, on_free: Callable[[], None]) -> DownloadSlots:
    """Download slots with the limits that the settings give; see `DownloadSlots`."""
    minimum, maximum = _concurrency_bounds(settings)
    rate = RateLimit(settings.max_requests_per_s, settings.max_bytes_per_s, time.monotonic())
    return DownloadSlots(AdaptiveConcurrency(minimum, maximum), rate, on_free=on_free)


class RuntimeSettings:
    """Changes settings of the running daemon. The next start uses its configuration again."""

    def __init__(self, settings: Settings, slots: DownloadSlots) -> None:
        self._settings = settings
        self._slots = slots

    def values(self) -> dict[str, Value]:
        """The changeable settings by name; None if a limit is not set."""
        return {name: getattr(self._settings, name) for name in CHANGEABLE}

    def change(self, body: bytes) -> dict[str, Value]:
        """Apply a JSON object of settings: all of them, or none if one is not valid. Returns the values after the change.

        A value is a number, null for no limit, or a text for a size. Raises ProtocolError, which names the setting.
        """
        try:
            changed = change_settings(self._settings, _parse_changes(body), "in the request")
        except SettingsError as exc:
            raise ProtocolError(str(exc)) from None
        before, self._settings = self.values(), changed
        minimum, maximum = _concurrency_bounds(changed)
        self._slots.set_limits(minimum, maximum, changed.max_requests_per_s, changed.max_bytes_per_s)
        for name, value in self.values().items():
            if value != before[name]:
                log.info("setting %s: changed from %s to %s", name, format_value(name, before[name]), format_value(name, value))
        return self.values()


def _concurrency_bounds(settings: Settings) -> tuple[int, int]:
    return min(settings.min_concurrency, settings.concurrency), settings.concurrency


def _parse_changes(body: bytes) -> Mapping[str, object]:
    try:
        changes = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"settings: not valid JSON ({exc})") from None
    if not isinstance(changes, dict):
        raise ProtocolError("settings: not a JSON object")
    for name, value in changes.items():
        if name not in CHANGEABLE:
            raise ProtocolError(
                f"setting {name[:40]!r} cannot be changed while the daemon runs; these can: {', '.join(CHANGEABLE)}"
            )
        # The configuration file accepts a text for a number. In JSON that is a mistake of the client.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and value is not None and not (name in SIZES and isinstance(value, str)):
            expected = "a number, null or a size such as 500MB" if name in SIZES else "a number or null"
            raise ProtocolError(f"setting {name}: must be {expected}, not {type(value).__name__}")
    return changes
