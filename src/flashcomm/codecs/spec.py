"""Spellings of codecs: one for each codec, and an error that helps for any other string.

none                              uncompressed, by the plain collective, in the tensor's own dtype
bf16, fp32                        values cast to that type
int4g128, int8                    1 to 8 bits, asymmetric, groups of 128 (the default)
int4sg32                          symmetric
mxfp8_e4m3, mxfp8_e5m2, mxfp6_e2m3, mxfp6_e3m2, mxfp4, nvfp4, fp8g128
fp5_e2m2g32, fp4_e2m1g16_e5m0     any element of `elements`, groups of 32 (the default), any scale of `scales`
int4sg16_e5m0                     integers with such a scale
int4static                        scales from a calibration
lossless, lossless_fp16           bf16 or fp16 values in fewer bytes, every bit kept; rows vary in length
q4_0, q8_0, qr_int4, qr_int6, qr_int8, e4m3   formats of other projects, see `peers`
nf4+peaks                         3 to 6 bits: a row's largest values kept, the rest transformed, Gaussian levels
ec4.25                            entropy-coded rows of 2.5 to 10 bits per value, in eighths
BASE+spike                        each group's smallest and largest value kept
BASE+hadamard, BASE+taco          transformed first
BASE+sr                           rounded up or down at random, without a mean error
BASE+keep64                       1 feature in 64 kept, from a calibration, before any transform
int4g128:int8g128                 a pair: the reduce-scatter's format, then the all-gather's
bf16/int4g128                     levels: inside a host, then between hosts

and whatever installed packages add under the entry point ``flashcomm.codecs``.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache, lru_cache
from importlib import metadata
from typing import Any

import torch

from flashcomm.codecs.affine import Affine
from flashcomm.codecs.base import Codec
from flashcomm.codecs.blocks import NAMES, Block
from flashcomm.codecs.calibrated import Keep, Static
from flashcomm.codecs.cast import Cast, Plain
from flashcomm.codecs.elements import ELEMENTS
from flashcomm.codecs.entropy import FEWEST, MOST, Entropy
from flashcomm.codecs.hadamard import Hadamard
from flashcomm.codecs.lossless import Lossless
from flashcomm.codecs.peaks import LEVELS, Peaks
from flashcomm.codecs.peers import PEERS, BareE4M3, Grouped
from flashcomm.codecs.scales import SCALES
from flashcomm.codecs.several import Levels, Pair
from flashcomm.codecs.spike import Spike
from flashcomm.codecs.stochastic import Stochastic
from flashcomm.errors import did_you_mean

DEFAULT_GROUP = 128
DEFAULT_BLOCK = 32
ENTRY_POINTS = "flashcomm.codecs"

_GROUP = "(?:g([1-9][0-9]*))?"
_SCALE = f"(?:_({'|'.join(SCALES)}))"
_AFFINE = re.compile(f"int([1-8])(s?){_GROUP}")
_BLOCK = re.compile(f"({'|'.join(name for name in ELEMENTS if name.startswith('fp'))}){_GROUP}{_SCALE}?")
_INT_BLOCK = re.compile(f"({'|'.join(name for name in ELEMENTS if name.startswith('int'))}){_GROUP}{_SCALE}")
_FP8 = re.compile(f"fp8{_GROUP}")
_STATIC = re.compile("int([2-8])static")
_KEEP = re.compile("keep([1-9][0-9]*)")
_PEAKS = re.compile("nf([1-9])\\+peaks")
_ENTROPY = re.compile(r"ec([0-9]+(?:\.[0-9]+)?)")

_EXACT = {
    "none": Plain(),
    "bf16": Cast(torch.bfloat16),
    "fp32": Cast(torch.float32),
    "lossless": Lossless(torch.bfloat16),
    "lossless_fp16": Lossless(torch.float16),
}
_FIXED = {**_EXACT, **NAMES, **PEERS}
_COMMON = [
    *(name for name in _FIXED if name not in PEERS),
    *(f"int{b}{s}g{g}" for b in range(1, 9) for s in ("", "s") for g in (32, 64, 128)),
    *(f"{name}g{g}" for name in ELEMENTS for g in (8, 16, 32) if name.startswith("fp")),
    *(f"{name}g{g}_e8m0" for name in ELEMENTS for g in (8, 16, 32) if name.startswith("int")),
    "fp8g128",
    "int4static",
    *(f"nf{bits}+peaks" for bits in LEVELS),
    *(f"ec{eighths / 8:g}" for eighths in range(FEWEST, MOST + 1)),
]


def parse(spec: "str | Codec") -> Codec:
    """Find the codec that `spec` names.

    Args:
        spec: a spelling as in the module's docstring, or a codec, which is returned unchanged.

    Raises:
        ValueError: no such codec; the message lists what is allowed and the nearest match.

    >>> str(parse("int8"))
    'int8g128'
    """
    if isinstance(spec, Codec):
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"a codec is a string such as 'int8g128', not {spec!r}. Allowed: {allowed()}")
    return _parse(spec)


@lru_cache(maxsize=1024)
def _parse(spec: str) -> Codec:
    if "/" in spec:
        parts = spec.split("/")
        if len(parts) != 2 or "none" in parts:
            raise ValueError(
                f"codec {spec!r}: levels are INSIDE/BETWEEN and neither is 'none'; bf16 or fp32 leave one uncompressed"
            )
        inside, between = (parse(part) for part in parts)
        if any(isinstance(single, Keep | Static) for single in (*inside.formats, *between.formats)):
            raise ValueError(
                f"codec {spec!r}: formats with a calibration know one group of ranks, not two levels of them"
            )
        return Levels(inside, between)
    if ":" in spec:
        parts = spec.split(":")
        if len(parts) != 2 or "none" in parts:
            raise ValueError(
                f"codec {spec!r}: a pair is FIRST:SECOND and neither is 'none'; bf16 or fp32 leave one uncompressed"
            )
        return Pair(parse(parts[0]), parse(parts[1]))
    base, *suffixes = re.split(r"\+(?!peaks)", spec)
    codec = _base(base)
    if codec is None:
        raise _unknown(base, f" in {spec!r}" if suffixes else "")
    kinds = [suffix.rstrip("0123456789") for suffix in suffixes]
    if len({"hadamard" if kind == "taco" else kind for kind in kinds}) < len(kinds):
        raise ValueError(f"codec {spec!r}: +spike, +sr, +keepN and one of +hadamard and +taco, each once")
    # Whatever the order in the name: features that are kept leave before values are transformed, and then they are
    # rounded.
    for suffix in sorted(suffixes, key=lambda suffix: suffix.startswith("keep") - (suffix == "sr")):
        wrap = _wrapper(suffix)
        if wrap is None or isinstance(codec, Plain | Cast | Lossless | Grouped | BareE4M3):
            raise ValueError(
                f"codec {spec!r}: +{suffix} is not known or not possible on {codec}. Allowed on formats with codes: "
                "+spike or +sr, +hadamard or +taco, and +keepN such as +keep64"
            )
        codec = wrap(codec)
    return codec


def _wrapper(suffix: str) -> "Callable[[Any], Codec] | None":
    if match := _KEEP.fullmatch(suffix):
        return lambda base: Keep(base, int(match[1]))
    return {
        "spike": Spike,
        "sr": Stochastic,
        "hadamard": Hadamard,
        "taco": lambda base: Hadamard(base, adaptive=True),
    }.get(suffix)


def _base(spec: str) -> Codec | None:
    if spec in _FIXED:
        return _FIXED[spec]
    if match := _AFFINE.fullmatch(spec):
        bits, symmetric, group = match.groups()
        return Affine(int(bits), symmetric == "s", int(group or DEFAULT_GROUP))
    if match := _BLOCK.fullmatch(spec) or _INT_BLOCK.fullmatch(spec):
        element, group, scale = match.groups()
        return Block(element, int(group or DEFAULT_BLOCK), scale or "e8m0")
    if match := _FP8.fullmatch(spec):
        return Block("fp8_e4m3", int(match[1] or DEFAULT_GROUP), "fp32")
    if match := _STATIC.fullmatch(spec):
        return Static(int(match[1]))
    if match := _PEAKS.fullmatch(spec):
        return Peaks(int(match[1]))
    if match := _ENTROPY.fullmatch(spec):
        eighths = 8 * Fraction(match[1])
        if eighths.denominator == 1 and FEWEST <= eighths <= MOST:
            return Entropy(int(eighths))
    return _installed(spec) if spec in _entry_points() else None


@cache
def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}


def _installed(name: str) -> Codec:
    """Load the codec of an installed package: its entry point names a codec, or a class that needs no arguments."""
    loaded = _entry_points()[name].load()
    codec = loaded if isinstance(loaded, Codec) else loaded()
    if not isinstance(codec, Codec) or str(codec) != name:
        raise ValueError(
            f"the entry point {name!r} of {ENTRY_POINTS} gives {str(codec)!r}: it must be a flashcomm.codecs.Codec "
            f"whose str() is {name!r}, so that every rank can find it by name"
        )
    return codec


def _unknown(spec: str, where: str) -> ValueError:
    meant = did_you_mean(spec, [*_COMMON, *_entry_points()])
    return ValueError(f"unknown codec {spec!r}{where}.{meant} Allowed: {allowed()}")


def allowed() -> str:
    """All spellings that are allowed, in one sentence."""
    more = f", {', '.join(_entry_points())} (installed)" if _entry_points() else ""
    return (
        f"{', '.join(_EXACT)}, int1 to int8 with optional s (symmetric) and gN (group size), "
        f"{', '.join((*NAMES, *PEERS))}, fp8gN, {', '.join(n for n in ELEMENTS if n.startswith('fp'))} "
        f"or int3s to int5s with gN and _{', _'.join(SCALES)} (scale), int2static to int8static, "
        f"nf{min(LEVELS)}+peaks to nf{max(LEVELS)}+peaks, ec{FEWEST / 8:g} to ec{MOST / 8:g} in eighths of a bit such "
        f"as ec4.25{more}; on them +spike or +sr, +hadamard or +taco, +keepN; a pair FIRST:SECOND; or levels "
        "INSIDE/BETWEEN"
    )
