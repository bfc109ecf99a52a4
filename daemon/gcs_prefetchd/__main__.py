"""`python -m gcs_prefetchd` is `gcs-prefetchd`."""

from gcs_prefetchd.cli import main

__all__: list[str] = []

main()
