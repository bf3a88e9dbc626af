"""Experiments that measure this machine. Answers are checked before anything is timed."""
