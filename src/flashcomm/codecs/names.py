"""Codecs as strings and back, for compiled graphs, which hold the string in place of the object.

The name of a codec is its spelling, if that parses back. Other codecs, bound to a calibration or of a class without an
entry point, are kept for as long as the process lives; their name is their identity. It holds a digest of the
calibration, so a graph that torch keeps on disk finds the same codec in the next process, or none.
"""

from flashcomm.codecs.base import Codec
from flashcomm.codecs.spec import parse

# No spelling starts with this.
_MARK = "="
_kept: dict[str, Codec] = {}


def name_of(codec: "str | Codec") -> str:
    """Give `codec` a string by which `named` finds it again in this process.

    Raises:
        ValueError: no such codec, or another one has the same identity.

    >>> name_of("int8")
    'int8g128'
    """
    codec = parse(codec)
    if parses_back(codec):
        return str(codec)
    name = _MARK + codec.identity
    if _kept.setdefault(name, codec) != codec:
        raise ValueError(
            f"two different codecs call themselves {codec.identity!r}: a compiled graph needs codecs that differ in "
            "their .identity"
        )
    return name


def named(name: str) -> Codec:
    """Find the codec that `name_of` gave this name.

    Raises:
        ValueError: no such codec in this process.
    """
    if not name.startswith(_MARK):
        return parse(name)
    if name not in _kept:
        raise ValueError(
            f"a compiled graph uses the codec {name.removeprefix(_MARK)!r}, which this process does not have: compile "
            "the function again, with the codec bound"
        )
    return _kept[name]


def parses_back(codec: Codec) -> bool:
    """Whether `parse` of the codec's spelling gives the codec."""
    try:
        return parse(str(codec)) == codec
    except ValueError:
        return False
