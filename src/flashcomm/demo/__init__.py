"""`flashcomm demo`: the bundled model over ranks of this machine, every codec side by side."""

from flashcomm.models import BUNDLED as MODEL

__all__ = ["MODEL"]
