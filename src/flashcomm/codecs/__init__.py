"""The wire formats: pure torch, any device. This is the specification that every fast kernel must equal."""

from flashcomm.codecs.affine import Affine
from flashcomm.codecs.base import FLOAT_DTYPES, Codec, decode_sum, decode_sum_encode
from flashcomm.codecs.cast import Cast, Plain
from flashcomm.codecs.spec import Pair, parse

__all__ = ["FLOAT_DTYPES", "Affine", "Cast", "Codec", "Pair", "Plain", "decode_sum", "decode_sum_encode", "parse"]
