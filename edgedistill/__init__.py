"""edgedistill: turn a distilled student into files that run on devices, and prove it."""

__version__ = "0.1.0"
