"""The one place the version is written; the build reads it from here without importing the package."""

__version__ = "0.1.0"
