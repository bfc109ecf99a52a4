"""The settings that can be changed while the daemon runs, and the slots that they hold for."""

import json
import logging
import time
from collections.abc import Mapping

from gcs_prefetchd.fetch.adaptive_concurrency import AdaptiveConcurrency
from gcs_prefetchd.fetch.download_slots import DownloadSlots
from gcs_prefetchd.fetch.rate_limit import RateLimit
from gcs_prefetchd.settings import Settings, change_settings, format_value
from gcs_prefetchd.shared.errors import ProtocolError, SettingsError

__all__ = ["CHANGEABLE", "Tuning", "make_slots"]

log = logging.getLogger(__name__)

CHANGEABLE = ("concurrency", "min_concurrency", "max_requests_per_s", "max_bytes_per_s")
SIZES = ("max_bytes_per_s",)

Value = int | float | None


def make_slots(settings: Settings) -> DownloadSlots:
    """Slots with the bounds that the settings give."""
    least, most = _bounds(settings)
    rate = RateLimit(settings.max_requests_per_s, settings.max_bytes_per_s, time.monotonic())
    return DownloadSlots(AdaptiveConcurrency(least, most), rate)


class Tuning:
    """Changes settings in force; a restart has those of its configuration again."""

    def __init__(self, settings: Settings, slots: DownloadSlots) -> None:
        self._settings = settings
        self._slots = slots

    def values(self) -> dict[str, Value]:
        """The settings in force, by name; None for none."""
        return {name: getattr(self._settings, name) for name in CHANGEABLE}

    def change(self, body: bytes) -> dict[str, Value]:
        """Put a JSON object of settings in force, all of it or, where one is refused, nothing; returns those of now.

        A number, null for none, or a text for a size. Raises ProtocolError that names the setting.
        """
        try:
            changed = change_settings(self._settings, _read(body), "in the request")
        except SettingsError as exc:
            raise ProtocolError(str(exc)) from None
        before, self._settings = self.values(), changed
        least, most = _bounds(changed)
        self._slots.set_limits(least, most, changed.max_requests_per_s, changed.max_bytes_per_s)
        for name, value in self.values().items():
            if value != before[name]:
                log.info(
                    "setting %s: %s from now on, %s before", name, format_value(name, value), format_value(name, before[name])
                )
        return self.values()


def _bounds(settings: Settings) -> tuple[int, int]:
    return min(settings.min_concurrency, settings.concurrency), settings.concurrency


def _read(body: bytes) -> Mapping[str, object]:
    try:
        changes = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"settings: not JSON ({exc})") from None
    if not isinstance(changes, dict):
        raise ProtocolError("settings: not a JSON object")
    for name, value in changes.items():
        if name not in CHANGEABLE:
            raise ProtocolError(f"setting {name[:40]!r} cannot be changed while running; these can: {', '.join(CHANGEABLE)}")
        # Where a text or true would do for the configuration file, whoever writes JSON has mistaken himself.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and value is not None and not (name in SIZES and isinstance(value, str)):
            wanted = "a number, null or a size such as 500MB" if name in SIZES else "a number or null"
            raise ProtocolError(f"setting {name}: must be {wanted}, not {type(value).__name__}")
    return changes
