"""The version, in the one place that the build reads."""

__version__ = "2026.11.0"
