"""The verbs of the codecs at the speed of the device, in the bytes of the specification (`flashcomm.codecs`).

verbs      encode, decode, decode_sum, decode_sum_encode, decode_sum_add_norm
warm       what a server loads before it serves
routes     the implementation that serves a codec on a device, and the reason
graph      encode and decode as operators of torch, for compiled graphs
cpu, gpu   the implementations; imported when first needed
"""

from flashcomm.kernels.arguments import check_payloads, check_storage, check_values
from flashcomm.kernels.routes import any_missing, load, missing, route
from flashcomm.kernels.verbs import decode, decode_sum, decode_sum_add_norm, decode_sum_encode, encode
from flashcomm.kernels.warm import warm_up

__all__ = [
    "any_missing", "check_payloads", "check_storage", "check_values", "decode", "decode_sum", "decode_sum_add_norm",
    "decode_sum_encode", "encode", "load", "missing", "route", "warm_up",
]  # fmt: skip
