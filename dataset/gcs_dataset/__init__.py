"""Read image datasets from Google Cloud Storage in PyTorch, through the cache of gcs-prefetchd or without it."""
