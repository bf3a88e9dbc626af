"""Tensors that formats and collectives have got wrong before, and the strategies that look for more."""

import torch
from hypothesis import strategies as st

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 patterns of a 16-bit type (NaN, Inf, subnormals), the bf16 ones widened for fp32: [256, 256]."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    source = torch.float16 if dtype == torch.float16 else torch.bfloat16
    return patterns.view(source).to(dtype).view(256, 256)


def special(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Named small tensors of finite values, [rows, cols]."""
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(5, 333, generator=generator)
    top = 6e4 if dtype == torch.float16 else 1e38
    spike = normal.clone()
    spike[:, 17] = top / 4
    tensors = {
        "zeros": torch.zeros(3, 130),
        "negative zeros": -torch.zeros(2, 77),
        "constant": torch.full((2, 130), 1.2345),
        "normal": normal,
        "one spike": spike,
        "huge": normal.sign() * top,
        "tiny": normal * 1e-7 if dtype == torch.float16 else normal * 1e-39,
        "every magnitude": normal * 10.0 ** torch.randint(-7, 4, (5, 333), generator=generator),
        "one column": torch.randn(4, 1, generator=generator),
        "strided": torch.randn(64, 64, generator=generator)[:, ::2],
        "window": torch.randn(16, 100, generator=generator)[:, 3:90],
    }
    between = torch.full((2, 64), 1 + 2.0**-7)
    # Spikes that lie between two bf16 numbers, next to which all others are.
    between[0, ::16], between[0, 1::16] = 1 + 2.0**-10, 0.0
    between[1, ::16], between[1, 1::16] = 1 + 2.0**-8, 9.0
    tensors["between bf16"] = torch.cat([between, -between])
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@st.composite
def matrices(draw, max_rows: int = 4, max_cols: int = 300) -> torch.Tensor:
    """[rows, cols] of any dtype and scale, sometimes with zeros, spikes, NaN or Inf."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, cols = draw(st.integers(0, max_rows)), draw(st.integers(1, max_cols))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, cols, generator=generator)
    x = x * 10.0 ** draw(st.integers(-45, 37)) + draw(st.sampled_from([0.0, 1.0, -300.0]))
    for value in draw(
        st.lists(st.sampled_from([0.0, -0.0, 3e38, -3e38, float("inf"), float("nan"), 1e-45]), max_size=3)
    ):
        if rows:
            x[draw(st.integers(0, rows - 1)), draw(st.integers(0, cols - 1))] = value
    return x.to(dtype)


def allowed_error(step: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Error that one encode and decode may make: half a spacing, fp32 rounding, and the final rounding to `dtype`."""
    magnitude = x.float().abs() + step
    return step * (0.5 + 2**-14) + 2**-23 * magnitude + last_rounding(magnitude, dtype)


def last_rounding(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance of neighbouring values of `dtype` at a magnitude, subnormals included."""
    bits, smallest = {torch.bfloat16: (8, -134), torch.float16: (11, -25), torch.float32: (24, -150)}[dtype]
    return magnitude * 2.0**-bits + 2.0**smallest
