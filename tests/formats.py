"""Every kind of format, for tests that hold for all of them."""

import torch

from flashcomm.codecs import Codec, Features, parse
from flashcomm.codecs.peers import PEERS as PEER_CODECS
from flashcomm.codecs.registry import ALL

# Those of the registry, without some sizes of entropy-coded rows, and combinations that are not worth using.
SPECS = (
    *(spec for spec in ALL if spec not in ("ec6", "ec5", "ec4", "ec3.5")),
    *("lossless_fp16", "ec2.625", "ec4+keep16", "nf6+peaks+keep16"),
    *("int4g100", "int1g1", "int7g8", "int5sg7", "int3g48", "int8g4096"),
    *("fp6_e2m3g100_e5m0", "fp8_e5m2g7_e4m3", "fp3_e1m1g1", "int5sg48_fp32", "fp8g300", "mxfp4+taco"),
    *("int8g100+spike", "int1g1+spike", "int3sg16+spike", "int6g256+spike", "int2g32+spike+keep16"),
    *("int5g100+hadamard", "int4g7+taco", "nvfp4+keep7", "int8static", "int2static+keep3"),
    *("int8g128+sr", "int4g32+sr", "fp8g128+sr+taco", "int8g100+sr", "int1g1+sr", "int3sg16+sr", "int5g7+sr+hadamard"),
    *("fp8g300+sr", "int2g32+sr+keep16"),
    *("int6g64+hadamard+keep16", "int2g32+taco+keep16"),
)

# Formats of other projects run on the specification alone, so no kernel has to equal it.
PEERS = tuple(PEER_CODECS)


def bound(spec: str, cols: int, rank: int = 0) -> Codec:
    """Bind a codec to a calibration of three ranks, in which every eleventh feature is always 0."""
    reach = 3 * torch.rand(4, cols, generator=torch.Generator().manual_seed(cols))
    reach[:, ::11] = 0
    return parse(spec).bind(Features(reach), rank)
