"""`python -m gcs_prefetchd` is `gcs-prefetchd`."""

from gcs_prefetchd.cli import main

main()
