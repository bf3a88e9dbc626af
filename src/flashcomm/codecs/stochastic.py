"""``+sr``: values are rounded up or down at random, so that the error is 0 on average.

Rounding to nearest always moves the same value the same way, and errors of one sign add up over the steps of a
training. Here a value that lies a share f of a spacing above one code becomes the next code with probability f. The
scales, the bytes and the decoder are the base's; only the choice of the code differs. Per group, in 32-bit integers:

    h    = the sum of mix(word + 0x9e3779b9 * place), with the fp32 word of each value and its place in the group
    k    = the upper 15 bits of mix(h + 0x9e3779b9 * place)
    code = round(x in spacings + (2 k + 1) / 2**16 - 1/2), 0 to the last code; half to even

with mix(w): w ^= w >> 16, w *= 0x21f0aaad, w ^= w >> 15, w *= 0x735a2d97, w ^= w >> 15.

There is no state and no seed: the counter is the place, and the key is made of the group's values. So all backends and
ranks round alike, batching and chunking of rows change nothing, and `flashcomm.simulate` predicts it. Hazard: equal
groups are rounded equally, on all ranks and in all steps; only errors of data that varies are 0 on average.

Bound: |error| < one spacing, twice that of rounding to nearest. Over all keys the mean error is at most 2**-15 of a
spacing, and fp32 rounding: (2 k + 1) / 2**16 takes 2**15 values around 1/2. A value that is a code stays one.

Source: stochastic rounding for training, Gupta et al. (arXiv 1502.02551); mix is a hash of the hash-prospector project
(C. Wellons); to key it by the group is our own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flashcomm.codecs import groups
from flashcomm.codecs.affine import Affine
from flashcomm.codecs.base import Codec
from flashcomm.codecs.blocks import Block
from flashcomm.codecs.groups import bits_of

GOLDEN = 0x9E3779B9
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Stochastic(Codec):
    """``{base}+sr`` on integers with groups, and on small floats with fp32 scales: see the module's docstring.

    Other scales of small floats let a group's largest value exceed the largest element a little, and what is cut off
    has a sign.

    By hand: 0 and 3 are the first and the last code of the range 0 to 3, and stay. 1.5 becomes 1 or 2.

    >>> codec = Stochastic(Affine(bits=2, symmetric=False, group=8))
    >>> x = torch.tensor([[0.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 3.0]])
    >>> codec.decode(codec.encode(x), 8, torch.float32).tolist()
    [[0.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 3.0]]
    """

    base: Affine | Block

    def __post_init__(self):
        # Its type itself counts: a subclass may round by rules of its own.
        if type(self.base) is not Affine and not (type(self.base) is Block and self.base.scale == "fp32"):
            raise ValueError(
                f"+sr needs a format that cuts nothing off, not {self.base}: int1 to int8 with optional s and gN, or "
                "fp8gN"
            )

    def __str__(self) -> str:
        return f"{self.base}+sr"

    @property
    def group(self) -> int:
        """Number of values with a common key."""
        return self.base.group

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return self.base.payload_bytes(cols, dtype)

    def segment(self, cols: int) -> int:
        return self.base.segment(cols)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return self.base.encode(x, dither(x, self.group))

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        return self.base.decode(payload, cols, dtype)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.base.step(x)


def dither(x: torch.Tensor, group: int) -> torch.Tensor:
    """fp32 [T, H] -> fp32 [T, H] of (-1/2, 1/2): what is added to each value, in spacings, before it is rounded."""
    cols = x.shape[1]
    if cols == 0:
        return x
    counter = torch.arange(cols, dtype=torch.int64, device=x.device) % group * GOLDEN
    mixed = _mix((bits_of(x).long() + counter) & _WORD)
    missing = groups.count(cols, group) * group - cols
    keys = F.pad(mixed, (0, missing)).unflatten(1, (-1, group)).sum(2)
    k = _mix((groups.by_value(keys, group, cols) + counter) & _WORD) >> 17
    return (2 * k + 1).float() * 2.0**-16 - 0.5


def _mix(word: torch.Tensor) -> torch.Tensor:
    """32-bit integers in int64 -> 32-bit integers; no product leaves int64."""
    word = (word ^ word >> 16) * FIRST & _WORD
    word = (word ^ word >> 15) * SECOND & _WORD
    return word ^ word >> 15
