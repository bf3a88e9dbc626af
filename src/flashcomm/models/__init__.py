"""Models to measure on: loading them over ranks, the text that they read, and the bundled one in `BUNDLED`."""

from flashcomm.models.load import BUNDLED

__all__ = ["BUNDLED"]
