"""The wire formats, in plain torch on any device: the specification that every fast kernel must equal byte for byte."""

from flashcomm.codecs.affine import Affine
from flashcomm.codecs.base import FLOAT_DTYPES, Codec, decode_sum, decode_sum_encode
from flashcomm.codecs.blocks import Block
from flashcomm.codecs.calibrated import Features, Keep, Static
from flashcomm.codecs.cast import Cast, Plain
from flashcomm.codecs.entropy import Entropy
from flashcomm.codecs.hadamard import Hadamard
from flashcomm.codecs.lossless import Lossless
from flashcomm.codecs.names import name_of, named, parses_back
from flashcomm.codecs.peaks import Peaks
from flashcomm.codecs.several import Levels, Pair
from flashcomm.codecs.spec import parse
from flashcomm.codecs.spike import Spike
from flashcomm.codecs.stochastic import Stochastic

__all__ = [
    "FLOAT_DTYPES", "Affine", "Block", "Cast", "Codec", "Entropy", "Features", "Hadamard", "Keep", "Levels", "Lossless",
    "Pair", "Peaks", "Plain", "Spike", "Static", "Stochastic", "decode_sum", "decode_sum_encode", "name_of", "named",
    "parse", "parses_back",
]  # fmt: skip
