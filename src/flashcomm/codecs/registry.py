"""Every kind of format, by its spelling, at the sizes that people use.

Tests hold all of them to the specification, and `flashcomm bench codec --all` measures them.
"""

ALL = (
    "lossless",
    *("ec8", "ec6", "ec5", "ec4.25", "ec4", "ec3.5", "ec3"),
    *("nf6+peaks", "nf5+peaks", "nf4+peaks", "nf3+peaks"),
    *("int8g128", "int6g128", "int5g128", "int4g128", "int4g32", "int3g32", "int2g32", "int1g32"),
    *("int8sg128", "int4sg32"),
    *("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4", "fp8g128"),
    *("fp5_e2m2g32", "fp5_e2m2g16_e5m0", "fp5_e2m2g8_e5m0"),
    *("fp4_e2m1g16_e5m0", "fp4_e2m1g8_e5m0", "fp3_e1m1g32", "fp3_e1m1g16_e5m0", "fp3_e1m1g8_e5m0"),
    *("int5sg32_e8m0", "int4sg32_e8m0", "int4sg16_e5m0", "int3sg32_e8m0"),
    *("int4g32+spike", "int3g32+spike", "int2g32+spike", "int2g64+spike"),
    *("int4g128+keep64", "int4g32+keep64", "int4static+keep64", "int4static"),
    *("int8g128+hadamard", "int6g128+hadamard", "int4g128+hadamard", "int4g32+hadamard", "mxfp4+hadamard"),
    *("int4g128+taco", "fp8g128+taco"),
)
