"""Block floating point: small floats that share a scale per group, ``mxfp4``, ``nvfp4``, ``fp8g128`` and relatives.

A format is an element (`elements.ELEMENTS`), a group size and a kind of scale (`scales.SCALES`); `NAMES` has those with
a short name. Per group, all in fp32:

    scale  brings the group's largest magnitude to the largest element: see `scales`
    code   the element nearest to x * (1 / scale), half to even
    value  element * scale

The scales of a row follow its codes. A group that holds a NaN, an Inf or a magnitude of 2**127 or more, whose element
times scale might not be finite, has the scale NaN and decodes to NaN.

Source: Communication Compression for TP LLM Inference (arXiv 2411.09510); OCP Microscaling Formats (MX) v1.0.
"""

from dataclasses import dataclass

import torch

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.base import Codec, canonical_nan
from flashcomm.codecs.elements import ELEMENTS, Element
from flashcomm.codecs.groups import like
from flashcomm.codecs.scales import SCALES, Scale


@dataclass(frozen=True, slots=True)
class Block(Codec):
    """``{element}g{group}[_{scale}]``: see the module's docstring.

    By hand: the largest of [0.5, 1, -2, 6] is the largest E2M1, so the scale is 1, stored as 127. The codes 1, 2, 12 (a
    sign and 4) and 7 share two bytes, 1 + 12 * 16 and 2 + 7 * 16.

    >>> Block(element="fp4_e2m1", group=4).encode(torch.tensor([[0.5, 1.0, -2.0, 6.0]])).tolist()
    [[193, 114, 127]]
    """

    element: str
    group: int
    scale: str = "e8m0"

    def __post_init__(self):
        if self.element not in ELEMENTS or self.scale not in SCALES:
            raise ValueError(
                f"no block format of {self.element!r} with scales {self.scale!r}. "
                f"Elements: {', '.join(ELEMENTS)}. Scales: {', '.join(SCALES)}"
            )
        groups.check(self.group)

    def __str__(self) -> str:
        return _SPELLING.get((self.element, self.group, self.scale)) or spelling(self.element, self.group, self.scale)

    @property
    def parts(self) -> tuple[Element, Scale]:
        """The element and the kind of scale."""
        return ELEMENTS[self.element], SCALES[self.scale]

    @property
    def limit(self) -> float:
        """Largest magnitude that a group may have, in units of its scale."""
        element, scale = self.parts
        return element.top + element.half_step * scale.power_of_two

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        element, scale = self.parts
        count = groups.count(cols, self.group)
        return planes.code_bytes(cols, element.bits) + (scale.num_bytes(count) if count else 0)

    def segment(self, cols: int) -> int:
        return self.group if cols % self.group == 0 and not self.parts[1].whole_rows else cols

    def _scales(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 groups [T, G, S] -> the scales' bytes [T, B], and the scales [T, G], which are NaN for a NaN group."""
        _, scale = self.parts
        amax = x.abs().amax(-1)
        bad = ~(amax < 2.0**127)
        payload = scale.encode(amax.masked_fill(bad, 0), self.limit, bad)
        return payload, scale.decode(payload, amax.shape[1])

    def encode(self, x: torch.Tensor, dither: torch.Tensor | None = None) -> torch.Tensor:
        """Encode [T, H]; `dither` [T, H], in spacings, is added before rounding: see `stochastic`."""
        cols = x.shape[1]
        if cols == 0:
            return torch.empty(x.shape[0], 0, dtype=torch.uint8, device=x.device)
        element, _ = self.parts
        x = groups.by_group(x.float(), self.group)
        payload, scale = self._scales(x)
        scale = scale[..., None]
        x = (x * (like(scale, 1.0) / scale)).masked_fill(scale.isnan(), 0.0)
        noise = None if dither is None else groups.by_group(dither, self.group)
        codes = element.encode(x, dither=noise).flatten(1)[:, :cols]
        return torch.cat([planes.pack(codes, element.bits), payload], 1)

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        element, scale = self.parts
        code_end = planes.code_bytes(cols, element.bits)
        value = element.decode(planes.unpack(payload[:, :code_end], cols, element.bits))
        if cols:
            scales = scale.decode(payload[:, code_end:], groups.count(cols, self.group))
            value = value * groups.by_value(scales, self.group, cols)
        return canonical_nan(value.to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] == 0:
            return x.float()
        scale = self._scales(groups.by_group(x.float(), self.group))[1]
        scale = groups.by_value(scale, self.group, x.shape[1])
        inside = (x.float() / scale).masked_fill(scale.isnan(), 0.0)
        return self.parts[0].spacing(inside) * scale


def spelling(element: str, group: int, scale: str) -> str:
    """The systematic name, for example ``fp4_e2m1g32_e5m0``. It leaves out the scale e8m0, except for integers."""
    if (element, scale) == ("fp8_e4m3", "fp32"):
        return f"fp8g{group}"
    return f"{element}g{group}" + (f"_{scale}" if scale != "e8m0" or element.startswith("int") else "")


NAMES = {
    "mxfp8_e4m3": Block("fp8_e4m3", 32),
    "mxfp8_e5m2": Block("fp8_e5m2", 32),
    "mxfp6_e2m3": Block("fp6_e2m3", 32),
    "mxfp6_e3m2": Block("fp6_e3m2", 32),
    "mxfp4": Block("fp4_e2m1", 32),
    "nvfp4": Block("fp4_e2m1", 16, "e4m3"),
}
_SPELLING = {(block.element, block.group, block.scale): name for name, block in NAMES.items()}
