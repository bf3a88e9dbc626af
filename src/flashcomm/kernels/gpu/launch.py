"""The verbs on GPUs: launches of `tiles.move`, with the constants and the tiles that suit a format.

All three verbs are one kernel: encode reads values and writes a payload, decode_sum reads payloads and writes values,
decode_sum_encode reads payloads and writes one. It is compiled for a pair of formats and a kind of row, never for a
number of rows, so prompts of any length share it.

Left to the specification: groups that are not a power of two (unless a row has only one), transformed and calibrated
formats, and groups that do not fit into a tile.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from flashcomm.codecs import FLOAT_DTYPES, Affine, Block, Cast, Codec, Spike
from flashcomm.kernels.gpu.tiles.base import Format
from flashcomm.kernels.gpu.tiles.move import move
from flashcomm.kernels.gpu.tiles.norm import add_norm

# Values of a tile, and values per warp (16 per thread). Not measured: no GPU has run these kernels yet.
TILE = 2048
LARGEST_TILE = 16384
_PER_WARP = 512

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
VALUES = {dtype: Format("values", dtype=_NAMES[dtype]) for dtype in FLOAT_DTYPES}


@lru_cache(maxsize=4096)
def why_not(codec: Codec, cols: int | None = None) -> str | None:
    """Why the kernel does not serve `codec`, in rows of `cols` values if given; None if it does."""
    # Its type itself counts: a subclass may mean other bytes.
    if type(codec) is Cast:
        return None
    if type(codec) not in (Affine, Block, Spike):
        return f"no GPU kernel for {codec}"
    assert isinstance(codec, Affine | Block | Spike)
    if codec.group & (codec.group - 1) and (cols is None or codec.group < cols):
        return f"the GPU kernel takes groups of a power of two, not of {codec.group}"
    if least_tile(describe(codec, cols or codec.group)) > LARGEST_TILE:
        return f"groups of {codec.group} are too large for a tile of the GPU kernel"
    if cols and cols >= 1 << 30:
        return f"the GPU kernel takes rows of less than {1 << 30} values, not of {cols}"
    return None


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@lru_cache(maxsize=4096)
def describe(codec: Codec, cols: int) -> Format:
    """The constants of `codec` in rows of `cols` values."""
    if isinstance(codec, Cast):
        return VALUES[codec.wire]
    assert isinstance(codec, Affine | Block | Spike)
    group = codec.group if codec.group < cols else _power_of_two(cols)
    if isinstance(codec, Affine):
        return Format("affine", group, codec.bits, symmetric=codec.symmetric, last=codec.last)
    if isinstance(codec, Spike):
        base = codec.base
        return Format("spike", group, base.bits, symmetric=base.symmetric, last=base.last, place_bits=codec.place_bits)
    element, _ = codec.parts
    return Format(
        "block",
        group,
        element.bits,
        exponent=element.exponent,
        mantissa=element.mantissa,
        last_element=element.last,
        top=element.top,
        limit=codec.limit,
        scale=codec.scale,
    )


def least_tile(form: Format) -> int:
    """Values of the shortest tile: places of spikes and exponents are packed as codes are, and must fill packs, too."""
    groups = {"spike": 64, "block": 128 if form.scale == "e5m0" else 1}
    return max(128, groups.get(form.kind, 1) * form.group)


def tile(*formats: Format, cols: int) -> int:
    """Values of the tile that suits these formats in rows of `cols` values."""
    # Tiles that end with the row need no masks; they are used unless they are too short.
    divisor = cols & -cols
    usual = min(TILE, divisor if divisor >= TILE // 4 else _power_of_two(max(cols, 128)))
    return max(usual, *map(least_tile, formats))


def edge(cols: int, size: int) -> str:
    """End of rows in tiles of `size`: with a tile (``none``), a whole pack (``packs``) or a short one (``codes``)."""
    return "none" if cols % size == 0 else "codes" if cols % 128 else "packs"


def encode(x: torch.Tensor, codec: Codec, out: torch.Tensor):
    """x[T, H] -> out[T, P]."""
    _move(x[None], VALUES[x.dtype], out, describe(codec, x.shape[1]), x.shape[1])


def decode_sum(payloads: torch.Tensor, codec: Codec, out: torch.Tensor):
    """payloads[R, T, P] -> out[T, H]."""
    _move(payloads, describe(codec, out.shape[1]), out, VALUES[out.dtype], out.shape[1])


def decode_sum_encode(payloads: torch.Tensor, codec: Codec, out_codec: Codec, cols: int, out: torch.Tensor):
    """payloads[R, T, P] -> out[T, P']."""
    _move(payloads, describe(codec, cols), out, describe(out_codec, cols), cols)


def decode_sum_add_norm(
    payloads: torch.Tensor,
    codec: Codec,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
    total: torch.Tensor,
):
    """payloads[R, T, P], residual[T, H], weight[H] -> out[T, H] and total[T, H]; rows of at most `LARGEST_TILE`."""
    cols = residual.shape[1]
    source, values = describe(codec, cols), VALUES[residual.dtype]
    size = max(_power_of_two(max(cols, 128)), least_tile(source))
    payloads = typed(payloads, source)
    kernel: Any = add_norm
    with on_device(residual):
        kernel[(residual.shape[0],)](
            payloads,
            payloads.stride(0),
            payloads.stride(1),
            payloads.shape[0],
            typed(residual, values),
            residual.stride(0),
            typed(weight, values),
            typed(out, values),
            typed(total, values),
            cols,
            epsilon,
            SOURCE=source,
            VALUES=values,
            V=size,
            EDGE=edge(cols, size),
            **options(size, source),
        )


def _move(source: torch.Tensor, source_format: Format, target: torch.Tensor, target_format: Format, cols: int):
    source, target = typed(source, source_format), typed(target, target_format)
    constants = constants_of(source_format, target_format, cols)
    programs = target.shape[0] * (1 if constants["WHOLE_ROWS"] else -(-cols // constants["V"]))
    # Of one rank there is no distance, which Triton would look at to choose a variant.
    strides = source.stride(0) if len(source) > 1 else 0, source.stride(1)
    with on_device(source):
        move[(programs,)](
            source,
            *strides,
            source.shape[0],
            target,
            target.stride(0),
            cols,
            **constants,
            **options(constants["V"], source_format, target_format),
        )


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """Make the GPU of `x` the current one, on which Triton launches; in the interpreter, nothing."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def constants_of(source: Format, target: Format, cols: int) -> dict[str, Any]:
    """Constants that `move` is compiled for, to bring rows of `cols` values from one format to another."""
    size = tile(source, target, cols=cols)
    whole_rows = target.scale in ("e4m3", "e5m0")
    return {"SOURCE": source, "TARGET": target, "V": size, "EDGE": edge(cols, size), "WHOLE_ROWS": whole_rows}


def options(size: int, *formats: Format) -> dict[str, Any]:
    """Compiler options of a kernel that works on tiles of `size` values in these formats."""
    # Spikes and small groups need many registers; with more values per thread some would be spilled to memory.
    group = min((16 if form.kind == "spike" else form.group for form in formats if form.group > 1), default=32)
    per_warp = _PER_WARP * min(group, 32) // 32
    return {"num_warps": min(32, max(4, size // per_warp)), "enable_fp_fusion": False}


def typed(rows: torch.Tensor, form: Format) -> torch.Tensor:
    """View `rows` as the integers that a kernel moves."""
    if form.kind != "values":
        return rows
    return rows.view(torch.int32 if form.dtype == "fp32" else torch.int16)
