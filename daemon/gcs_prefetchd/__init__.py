"""A daemon that fetches what a training job will read next from Google Cloud Storage into a directory of files."""

__all__ = ["__version__"]

__version__ = "0.1.0"
