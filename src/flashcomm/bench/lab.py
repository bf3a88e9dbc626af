"""The lab under its earlier name; `flashcomm.lab` documents it."""

from flashcomm.lab import Lab

__all__ = ["Lab"]
