"""Small floating-point numbers: one row of `ELEMENTS` per format.

A code is sign, exponent, mantissa, highest bit first. With e exponent bits and m mantissa bits the exponent's bias is
2**(e - 1) - 1, the exponent field 0 holds subnormals, and there are no infinities. The integers of a block format are
the same thing with one exponent bit: e1m2 has the values 0 to 7 half-units, so `int4` is a sign and three bits.

Separate from `blocks` because a scale of NVFP4 is an FP8 number, too.

Source: OCP Microscaling Formats (MX) v1.0, section 5.3, for E4M3, E5M2, E3M2, E2M3 and E2M1; arXiv 2411.09510 for the
rest.
"""

from dataclasses import dataclass

import torch

from flashcomm.codecs.groups import from_bits


@dataclass(frozen=True, slots=True)
class Element:
    """A number of a sign, `exponent` bits and `mantissa` bits; the code of the largest magnitude is `last`.

    >>> ELEMENTS["fp4_e2m1"].values().tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """

    exponent: int
    mantissa: int
    last: int

    @property
    def bits(self) -> int:
        """Bits of a code, the sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def lowest(self) -> int:
        """The exponent of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)

    def values(self) -> torch.Tensor:
        """The magnitudes of the codes 0 to `last`, fp32."""
        return self.decode(torch.arange(self.last + 1, dtype=torch.int32, device="cpu"))

    @property
    def top(self) -> float:
        """The largest magnitude."""
        return self.values()[-1].item()

    @property
    def half_step(self) -> float:
        """Half the distance between the two largest magnitudes."""
        second, first = self.values()[-2:].tolist()
        return (first - second) / 2

    def spacing(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 -> fp32: the distance between neighbouring elements around each x, an exact power of two."""
        exponent = torch.frexp(x.abs())[1] - 1
        highest = self.lowest + max(self.last >> self.mantissa, 1) - 1
        exponent = torch.where(x == 0, self.lowest, exponent).clamp(self.lowest, highest)
        return from_bits(exponent.to(torch.int32) - self.mantissa + 127 << 23)

    def encode(self, x: torch.Tensor, *, up: bool = False, dither: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 -> int32 codes, rounded half to even, or away from zero if `up`; at most the largest element.

        `dither`, in spacings, is added to magnitudes before they are rounded.
        """
        spacing = self.spacing(x)
        count = x.abs().clamp_max(2 * self.top) / spacing
        count = count if dither is None else count + dither
        count = torch.ceil(count) if up else torch.round(count)
        # Every binade above the first adds 2**mantissa codes; a count that reaches the next binade carries by itself.
        binades = (spacing.view(torch.int32) >> 23) - 127 + self.mantissa - self.lowest
        magnitude = ((binades << self.mantissa) + count.to(torch.int32)).clamp_max(self.last)
        return magnitude | torch.signbit(x).to(torch.int32) << self.bits - 1

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Integer codes -> fp32, exact."""
        code = code.to(torch.int32)
        magnitude = code & (1 << self.bits - 1) - 1
        binade = (magnitude >> self.mantissa).clamp_min(1)
        count = magnitude - (binade - 1 << self.mantissa)
        value = count.float() * from_bits(binade - 1 + self.lowest - self.mantissa + 127 << 23)
        return torch.where(code >> self.bits - 1 != 0, -value, value)


ELEMENTS = {
    "fp8_e4m3": Element(4, 3, 0x7E),  # 0x7f is NaN there
    "fp8_e5m2": Element(5, 2, 0x7B),  # 0x7c to 0x7f are Inf and NaN there
    "fp6_e2m3": Element(2, 3, 31),
    "fp6_e3m2": Element(3, 2, 31),
    "fp5_e2m2": Element(2, 2, 15),
    "fp4_e2m1": Element(2, 1, 7),
    "fp3_e1m1": Element(1, 1, 3),
    "int5s": Element(1, 3, 15),
    "int4s": Element(1, 2, 7),
    "int3s": Element(1, 1, 3),
}
