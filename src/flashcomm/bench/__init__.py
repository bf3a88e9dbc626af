"""Measuring: one timer, one way to start ranks, one form of row. Correctness is checked before anything is timed."""
