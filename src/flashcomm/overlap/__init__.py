"""Overlap within one prompt: one part computes while the sums of another are on the wire.

with flashcomm.overlap.prefill(model, codec="int8g128"):  # a model loaded tensor parallel
model.generate(**inputs)
"""

from flashcomm.overlap.prompts import Overlap, prefill, wrap

__all__ = ["Overlap", "prefill", "wrap"]
