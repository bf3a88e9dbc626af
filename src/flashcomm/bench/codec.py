"""`flashcomm bench codec`: encode and decode against a copy of the same tensor, after a check of 256 rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from flashcomm import codecs, kernels
from flashcomm.bench.timing import interleaved
from flashcomm.codecs import Codec, Features

_CHECKED_ROWS = 256
_ROW = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRow:
    """One codec's figures; the fields are the columns of `results/codec_*.json`."""

    codec: str
    backend: str
    dtype: str
    mib: int
    threads: int
    bits_per_value: float
    sqnr_db: float
    """SQNR of Gaussian values: infinite if no bit is lost, which is null in JSON."""
    sqnr_heavy_db: float
    """SQNR of values of Student's t distribution with four degrees of freedom."""
    sqnr_model_db: float | None
    """Mean SQNR of the bundled model's partial sums on 4 ranks."""
    encode_ms: float
    decode_ms: float
    copy_ms: float
    encode_vs_copy: float
    decode_vs_copy: float
    bytes_equal_specification: bool


def run(
    specs: Sequence[str],
    *,
    mib: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 15,
    device: str = "cpu",
    partial_sums: Mapping[str, torch.Tensor] | None = None,
    progress: Callable[[str], object] = lambda codec: None,
) -> list[CodecRow]:
    """Measure each codec on rows of 4,096 values.

    Args:
        specs: codecs, no pairs. A codec that needs a calibration gets one of the tensor's own first rows.
        mib: size of the tensor.
        dtype: values' type in the tensor.
        repeats: timed rounds; encode, decode and the copy take turns in each.
        device: ``cpu`` or ``cuda``.
        partial_sums: bf16 [R, T, H] by name, for `CodecRow.sqnr_model_db`.
        progress: called with the name of each codec before it is measured.

    Raises:
        RuntimeError: a kernel's bytes or values differ from the specification's; no time is given then.
    """
    rows = mib * (1 << 20) // dtype.itemsize // _ROW
    x = (
        torch.randn(rows, _ROW, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
        .to(dtype)
        .to(device)
    )
    copy, decoded = torch.empty_like(x), torch.empty_like(x)
    sync = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    table = []
    for spec in specs:
        progress(spec)
        codec = bound(codecs.parse(spec), x[:_CHECKED_ROWS])
        payload = kernels.encode(x, codec)
        check(codec, x[:_CHECKED_ROWS], payload[:_CHECKED_ROWS])
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
        )
        encode_ms, decode_ms, copy_ms = (times[name].p50_ms for name in ("encode", "decode", "copy"))
        gaussian, heavy, model = sqnrs(codecs.parse(spec), partial_sums)
        table.append(
            CodecRow(
                codec=str(codec),
                backend=kernels.route(codec, x.device.type)[0],
                dtype=str(dtype).removeprefix("torch."),
                mib=mib,
                threads=torch.get_num_threads(),
                bits_per_value=bits_per_value(codec, payload),
                sqnr_db=gaussian,
                sqnr_heavy_db=heavy,
                sqnr_model_db=model,
                encode_ms=encode_ms,
                decode_ms=decode_ms,
                copy_ms=copy_ms,
                encode_vs_copy=encode_ms / copy_ms,
                decode_vs_copy=decode_ms / copy_ms,
                bytes_equal_specification=True,
            )
        )
    return table


def bits_per_value(codec: Codec, payload: torch.Tensor) -> float:
    """Average bits per value of what is used of payload[T, P]."""
    return 8 * codec.lengths(payload).double().mean().item() / _ROW


def check(codec: Codec, x: torch.Tensor, payload: torch.Tensor):
    """Refuse to measure a kernel that is wrong.

    Raises:
        RuntimeError: the payload, its size or the decoded values are not the specification's.
    """
    cols = x.shape[1]
    expected = codec.encode(x)
    if payload.shape != (x.shape[0], codec.payload_bytes(cols, x.dtype)) or not torch.equal(payload, expected):
        raise RuntimeError(f"{codec}: the kernel's bytes differ from the specification's")
    values = kernels.decode(payload, codec, cols=cols, dtype=x.dtype)
    if not torch.equal(values, codec.decode(expected, cols, x.dtype)):
        raise RuntimeError(f"{codec}: the kernel's values differ from the specification's")


def bound(codec: Codec, x: torch.Tensor) -> Codec:
    """Bind `codec`, where it needs a calibration, to one of the rows of x[T, H] on a single rank."""
    return codec.bind(Features(x.float().abs().amax(0).expand(2, -1)), 0)


def sqnrs(codec: Codec, partial_sums: Mapping[str, torch.Tensor] | None = None) -> tuple[float, float, float | None]:
    """SQNRs in dB: of 256 rows of Gaussian values, of heavy-tailed ones, and of partial sums (the mean over them)."""
    generator = torch.Generator().manual_seed(1)
    gaussian = torch.randn(2 * _CHECKED_ROWS, _ROW, generator=generator, dtype=torch.float32, device="cpu")
    # Student's t with four degrees of freedom: a Gaussian over the root of a mean of four squares.
    spread = (
        torch.randn(4, 2 * _CHECKED_ROWS, _ROW, generator=generator, dtype=torch.float32, device="cpu")
        .square()
        .mean(0)
        .sqrt()
    )
    heavy = torch.randn(2 * _CHECKED_ROWS, _ROW, generator=generator, dtype=torch.float32, device="cpu") / spread
    figures = [_sqnr(codec, samples.bfloat16()[None]) for samples in (gaussian, heavy)]
    if partial_sums is None:
        return figures[0], figures[1], None
    return figures[0], figures[1], sum(_sqnr(codec, parts) for parts in partial_sums.values()) / len(partial_sums)


def _sqnr(codec: Codec, parts: torch.Tensor) -> float:
    """SQNR of the second half of parts[R, T, H], calibrated on the first."""
    known, judged = parts.chunk(2, 1)
    total = known.float().sum(0, keepdim=True)
    features = Features(torch.cat([known.float(), total]).abs().amax(1))
    decoded = []
    for rank, x in enumerate(judged):
        mine = codec.bind(features, rank)
        decoded.append(kernels.decode(kernels.encode(x, mine), mine, cols=x.shape[1], dtype=torch.float32))
    return sqnr_db(judged, torch.stack(decoded))


def sqnr_db(x: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to quantisation noise in decibels: 10 log10(sum x^2 / sum (x - y)^2)."""
    signal = x.float().square().sum().item()
    noise = (x.float() - approximation.float()).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
