"""edgedistill: turn a distilled student language model into files that run on devices, and prove it."""

__version__ = "0.1.0"
