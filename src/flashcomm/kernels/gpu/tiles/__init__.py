"""The formats as device functions: a tile of a row of payload to fp32, and back.

A tile is a power of two of neighbouring values of one row, made of whole groups and of whole packs of codes. One
kernel, `move`, reads tiles of values or payloads, adds those of several ranks, and writes tiles of values or of a
payload. Each format is written once, for this kernel and for the all-reduces of `transports.symmetric`.

Bytes equal those of `flashcomm.codecs`. So every rounding is made of integers or of one fp32 operation that IEEE 754
defines, nothing is fused (``enable_fp_fusion=False``), and divisions are ``div_rn``. The results are then right in
Triton's interpreter, too, which truncates where it should round to bf16.
"""
