"""The size of the prefetch window: how many items ahead of its reader a stream's items are kept on disk. Pure."""

from gcs_prefetchd.planning.stream import Stream
from gcs_prefetchd.shared.moving_average import MovingDuration

__all__ = ["MAX_SPARE_ITEMS", "MAX_SPARE_SHARE", "MAX_WINDOW_ITEMS", "spare_items", "window_items"]

MAX_SPARE_ITEMS = 16  # for reads that arrive in bursts
MAX_SPARE_SHARE = 0.01  # of what the cache holds
MAX_WINDOW_ITEMS = 100_000


def window_items(stream: Stream, download_s: MovingDuration, report_gap_s: MovingDuration, spare: int, now_s: float) -> int:
    """As many items as the reader reads during one download, plus `spare`."""
    # Three deviations: the reader waits for a download that takes longer, which is about one in a thousand. The reads since
    # its last report take up some of the window, too.
    wait_s = download_s.mean_s + 3 * download_s.deviation_s
    wait_s += report_gap_s.mean_s + report_gap_s.deviation_s
    # Workers overtake each other, and all of them are served; but items left behind by a lost report hardly count.
    ahead = min(stream.front - stream.first_unread, 2 * (stream.front - stream.position))
    needed = int(stream.rate.per_s(now_s) * wait_s) + ahead
    return min(needed + spare, MAX_WINDOW_ITEMS)


def spare_items(cache_bytes: int, item_bytes: float) -> int:
    """Spare items for bursts. Fewer for a small cache: the hits that they cost it outweigh the waits that they save."""
    return max(1, min(MAX_SPARE_ITEMS, int(MAX_SPARE_SHARE * cache_bytes / item_bytes)))
