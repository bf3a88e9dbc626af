"""`flashcomm bench codec`: encode and decode against a copy of the same tensor, after a check of every byte."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from flashcomm import codecs, kernels
from flashcomm.bench.timing import interleaved

_CHECKED_ROWS = 256
_ROW = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRow:
    """One codec's figures; the fields are the columns of `results/codec_*.jsonl`."""

    codec: str
    backend: str
    dtype: str
    mib: int
    threads: int
    bits_per_value: float
    sqnr_db: float
    encode_ms: float
    decode_ms: float
    copy_ms: float
    encode_vs_copy: float
    decode_vs_copy: float
    bytes_equal_specification: bool

    def as_dict(self) -> dict:
        """The row as JSON stores it."""
        return asdict(self)


def run(
    specs: Sequence[str],
    *,
    mib: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 15,
    device: str = "cpu",
    progress: Callable[[], object] = lambda: None,
) -> list[CodecRow]:
    """Measure each codec on Gaussian rows of 4,096 values.

    Args:
        specs: codecs, no pairs.
        mib: size of the tensor.
        dtype: of the tensor.
        repeats: timed rounds; encode, decode and the copy take turns in each.
        device: where.
        progress: called after every round.

    Raises:
        RuntimeError: a kernel's bytes differ from the specification's; no time is given then.
    """
    rows = mib * (1 << 20) // dtype.itemsize // _ROW
    x = torch.randn(rows, _ROW, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    copy, decoded = torch.empty_like(x), torch.empty_like(x)
    sync = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    table = []
    for spec in specs:
        codec = codecs.parse(spec)
        payload = kernels.encode(x, codec)
        if not torch.equal(payload[:_CHECKED_ROWS], codec.encode(x[:_CHECKED_ROWS])):
            raise RuntimeError(f"{codec}: the kernel's bytes differ from the specification's")
        times = interleaved(
            {
                "copy": lambda: copy.copy_(x),
                "encode": lambda codec=codec, payload=payload: kernels.encode(x, codec, out=payload),
                "decode": lambda codec=codec, payload=payload: kernels.decode(
                    payload, codec, cols=_ROW, dtype=dtype, out=decoded
                ),
            },
            repeats=repeats,
            before=sync,
            after=sync,
            progress=progress,
        )
        encode_ms, decode_ms, copy_ms = (times[name].p50_ms for name in ("encode", "decode", "copy"))
        table.append(
            CodecRow(
                codec=str(codec),
                backend=kernels.route(codec, x.device.type)[0],
                dtype=str(dtype).removeprefix("torch."),
                mib=mib,
                threads=torch.get_num_threads(),
                bits_per_value=codec.bits_per_value(_ROW, dtype),
                sqnr_db=sqnr_db(x, decoded),
                encode_ms=encode_ms,
                decode_ms=decode_ms,
                copy_ms=copy_ms,
                encode_vs_copy=encode_ms / copy_ms,
                decode_vs_copy=decode_ms / copy_ms,
                bytes_equal_specification=True,
            )
        )
    return table


def sqnr_db(x: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to quantisation noise in decibels: 10 log10(sum x^2 / sum (x - y)^2)."""
    signal = x.float().square().sum().item()
    noise = (x.float() - approximation.float()).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
