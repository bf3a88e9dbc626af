"""The verbs in CUDA C++: which formats it serves, how the source spells them, and launches.

Left to Triton: all other formats, and pairs with one of them. Rows without loss and entropy-coded ones are decoded here
and encoded by the specification.
"""

import logging
import sys
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path

import torch

from flashcomm import codecs, settings
from flashcomm.codecs import Affine, Block, Codec, Entropy, Hadamard, Lossless
from flashcomm.codecs.entropy_layout import SECOND_PAIR, TOP, canonical
from flashcomm.codecs.entropy_tables import MANTISSAS
from flashcomm.kernels.gpu.cuda import compiler
from flashcomm.kernels.gpu.cuda.driver import THREADS, Arguments, EntropyArguments, kernel, make_current

_log = logging.getLogger("flashcomm.kernels")

_NAMES = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}
VALUES = {dtype: f"Values<{name}>" for dtype, name in _NAMES.items()}
"""Values as the source spells them, by their type."""
LAYOUTS = ("Wide<16>", "Wide<4>", "Thin")
_PACK, _PACKS_PER_BLOCK = 128, {"Wide<16>": 32, "Wide<4>": 32, "Thin": 4}
_DECODED_ONLY = (Lossless, Entropy)
"""Formats that the specification encodes."""
_MOST_UNPACKED = 32
"""Ranks whose rows without loss are added: a lane counts the escapes of each."""
_MOST_STREAMS = 8
"""Ranks whose entropy-coded rows are added: a lane keeps a stream of each."""
ENTROPY = Path(__file__).with_name("entropy.cu")
"""The kernel that decodes entropy-coded rows."""
_MOST_BLOCKS = 1 << 20
"""Blocks of one launch; where there are more packs, a block takes several."""


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why CUDA C++ cannot be compiled here, said once in the log; None if it can."""
    if torch.version.hip:
        why = "CUDA C++ is for NVIDIA's GPUs"
    elif sys.platform != "linux":
        why = "CUDA C++ kernels are for Linux"
    elif compiler.find() is None:
        why = "NVRTC is not installed (it comes with a CUDA build of torch)"
    else:
        return None
    _log.warning("FLASHCOMM_CUDA=1, but %s: Triton serves all formats", why)
    return why


def why_not(codec: Codec) -> str | None:
    """Why the CUDA C++ kernels do not serve `codec`; None if they do."""
    if not settings.switched_on("FLASHCOMM_CUDA"):
        return "FLASHCOMM_CUDA is off"
    serves = spell(codec) or type(codec) in _DECODED_ONLY
    return unavailable() or (None if serves else f"no CUDA C++ kernel for {codec}")


@lru_cache(maxsize=4096)
def spell(codec: Codec) -> str | None:
    """A format as `codecs.cu` spells it, None for formats that it does not have.

    >>> from flashcomm.codecs import parse
    >>> spell(parse("mxfp4+hadamard"))
    'Hadamard<Block<2, 1, 7, 32, E8M0>, 32>'
    """
    # Its type itself counts: a subclass may mean other bytes.
    if type(codec) is Hadamard and not codec.adaptive:
        base = spell(codec.base)
        return base and f"Hadamard<{base}, {codec.group}>"
    if type(codec) is Affine and codec.bits in (4, 8) and not codec.symmetric and codec.group in (32, 64, 128):
        return f"Affine<{codec.bits}, {codec.group}>"
    if type(codec) is Block and codec.element in ("fp4_e2m1", "fp8_e4m3") and codec.group in (32, 64, 128):
        element, scale = codec.parts[0], {"e8m0": "E8M0", "fp32": "SCALE_FP32"}.get(codec.scale)
        if scale:
            return f"Block<{element.exponent}, {element.mantissa}, {element.last}, {codec.group}, {scale}>"
    return None


@lru_cache(maxsize=4096)
def macros(source: str, target: str, layout: str, sum_ranks: bool) -> tuple[tuple[str, str], ...]:
    """Macros that the kernel is compiled for."""
    return ("SOURCE", source), ("TARGET", target), ("LAYOUT", layout), ("SUM_RANKS", str(int(sum_ranks)))


def encode(x: torch.Tensor, codec: Codec, out: torch.Tensor):
    """x[T, H] -> out[T, P]."""
    if isinstance(codec, _DECODED_ONLY):
        out.copy_(codec.encode(x))
        return
    _move(x[None], VALUES[x.dtype], out, spell(codec), x.shape[1])


def decode_sum(payloads: torch.Tensor, codec: Codec, out: torch.Tensor):
    """payloads[R, T, P] -> out[T, H]."""
    if isinstance(codec, Lossless):
        _unpack(payloads, codec, out)
        return
    if isinstance(codec, Entropy):
        _decode_entropy(payloads, codec, out)
        return
    _move(payloads, spell(codec), out, VALUES[out.dtype], out.shape[1])


def decode_sum_encode(payloads: torch.Tensor, codec: Codec, out_codec: Codec, cols: int, out: torch.Tensor):
    """payloads[R, T, P] -> out[T, P']."""
    if isinstance(codec, _DECODED_ONLY) or isinstance(out_codec, _DECODED_ONLY):
        total = torch.empty(out.shape[0], cols, dtype=torch.float32, device=out.device)
        decode_sum(payloads, codec, total)
        encode(total, out_codec, out)
        return
    _move(payloads, spell(codec), out, spell(out_codec), cols)


def layout_of(source: torch.Tensor, target: torch.Tensor, cols: int) -> str:
    """The layout that suits rows of `cols` values: the widest whose accesses are all aligned.

    `source` is [R, T, ...] and `target` [T, ...], each of values or of payloads (uint8).
    """
    if cols % _PACK:
        return "Thin"
    aligned = []
    for rows in (source, target):
        strides = [step for step, size in zip(rows.stride()[:-1], rows.shape, strict=False) if size > 1]
        at = reduce(or_, (step * rows.element_size() for step in strides), rows.data_ptr())
        aligned.append(at & -at)
        if rows.dtype != torch.uint8 and aligned[-1] < 16:
            return "Thin"
    least = min(aligned)
    return "Wide<16>" if least >= 16 else "Wide<4>" if least >= 4 else "Thin"


def plan(
    source: torch.Tensor, source_format: str, target: torch.Tensor, target_format: str, cols: int
) -> tuple[str, Arguments, tuple[tuple[str, str], ...]]:
    """Layout, arguments and macros of the kernel that fills target [T, ...] from source [R, T, ...]."""
    layout, kind = layout_of(source, target, cols), source.shape[0] > 1
    return layout, arguments_of(source, target, cols), macros(source_format, target_format, layout, kind)


def arguments_of(source: torch.Tensor, target: torch.Tensor, cols: int) -> Arguments:
    """Arguments of a kernel that fills target [T, ...] from source [R, T, ...]."""
    size = source.element_size()
    return Arguments(
        source.data_ptr(),
        source.stride(0) * size,
        source.stride(1) * size,
        target.data_ptr(),
        target.stride(0) * target.element_size(),
        target.shape[0],
        source.shape[0],
        cols,
    )


def unpack_macros(codec: Lossless, dtype: torch.dtype, sum_ranks: bool) -> tuple[tuple[str, str], ...]:
    """Macros of the kernel that decodes rows without loss.

    >>> unpack_macros(Lossless(torch.bfloat16), torch.float32, True)
    (('UNPACK', 'BF16, FP32, true'),)
    """
    return (("UNPACK", f"{_NAMES[codec.wire]}, {_NAMES[dtype]}, {str(sum_ranks).lower()}"),)


def _unpack(payloads: torch.Tensor, codec: Lossless, out: torch.Tensor):
    if len(payloads) > _MOST_UNPACKED:
        out.copy_(codecs.decode_sum(payloads, codec, out.shape[1], out.dtype))
        return
    kind, arguments = unpack_macros(codec, out.dtype, len(payloads) > 1), arguments_of(payloads, out, out.shape[1])
    # A warp for each row.
    _start(kind, "unpack", min(-(-len(out) // 4), _MOST_BLOCKS), payloads.device, arguments)


def entropy_macros(dtype: torch.dtype, ranks: int) -> tuple[tuple[str, str], ...]:
    """Macros of the kernel that decodes entropy-coded rows of `ranks` ranks.

    >>> entropy_macros(torch.float32, 3)
    (('DECODED', 'FP32'), ('MOST_RANKS', '8'))
    """
    return ("DECODED", _NAMES[dtype]), ("MOST_RANKS", str(_MOST_STREAMS if ranks > 1 else 1))


@lru_cache(maxsize=64)
def _entropy_tables(device: torch.device) -> torch.Tensor:
    """`Tables` of entropy.cu. Copied once, since a copy from the host cannot be part of a CUDA graph."""
    tables = [canonical(table) for table in range(TOP + 1)]
    numbers = torch.tensor([*MANTISSAS, *(table.limit for table in tables), 0], dtype=torch.int32, device="cpu")
    words = [place | table.lengths[place] << 8 for table in tables for place in table.place]
    both = numbers.view(torch.uint8), torch.tensor(words, dtype=torch.int16, device="cpu").view(torch.uint8)
    return torch.cat(both).to(device)


def entropy_arguments(payloads: torch.Tensor, out: torch.Tensor) -> EntropyArguments:
    """Arguments of the kernel that fills out [T, H] from entropy-coded payloads [R, T, P]."""
    common = arguments_of(payloads, out, out.shape[1])
    fields = [getattr(common, field[0]) for field in Arguments._fields_]
    return EntropyArguments(*fields, _entropy_tables(payloads.device).data_ptr(), payloads.shape[2])


def _decode_entropy(payloads: torch.Tensor, codec: Entropy, out: torch.Tensor):
    if len(payloads) > _MOST_STREAMS:
        out.copy_(codecs.decode_sum(payloads, codec, out.shape[1], out.dtype))
        return
    streams = 2 if out.shape[1] < SECOND_PAIR else 4
    blocks = -(-len(out) * streams // THREADS)
    kind = entropy_macros(out.dtype, len(payloads))
    _start(kind, "decode_entropy", blocks, payloads.device, entropy_arguments(payloads, out), ENTROPY)


def _move(source: torch.Tensor, source_format: str | None, target: torch.Tensor, target_format: str | None, cols: int):
    assert source_format and target_format
    layout, arguments, kind = plan(source, source_format, target, target_format, cols)
    packs = target.shape[0] * -(-cols // _PACK)
    assert packs < 1 << 32, "more packs than memory holds"
    blocks = min(-(-packs // _PACKS_PER_BLOCK[layout]), _MOST_BLOCKS)
    _start(kind, "move", blocks, source.device, arguments)


def _start(
    kind: tuple[tuple[str, str], ...],
    name: str,
    blocks: int,
    device: torch.device,
    arguments: Arguments,
    more: Path | None = None,
):
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        make_current(index)
        kernel(kind, index, name, more)(blocks, torch.cuda.current_stream().cuda_stream, arguments)
