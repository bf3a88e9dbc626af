"""Properties of all formats: spelling, size, the published bound, and kernels that equal the specification."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import formats
import values
from flashcomm import codecs, kernels
from flashcomm.codecs import parse

#: Groups per format that are tried against the bound; a million takes some minutes.
FUZZ_GROUPS = int(os.environ.get("FLASHCOMM_FUZZ_GROUPS", "4000"))


def same_bytes(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_kernels_equal_specification(spec, x):
    cols = x.shape[1]
    codec = formats.bound(spec, cols)
    payload = codec.encode(x)
    assert payload.shape[1] == codec.payload_bytes(cols), f"{spec} {list(x.shape)}: size"
    assert same_bytes(kernels.encode(x, codec), payload), f"{spec} {x.dtype} {list(x.shape)}: encode"
    for dtype in values.DTYPES:
        decoded = kernels.decode(payload, codec, cols=cols, dtype=dtype)
        assert same_bytes(decoded, codec.decode(payload, cols, dtype)), f"{spec} {dtype} {list(x.shape)}: decode"


def assert_within_published_bound(codec, x):
    decoded = kernels.decode(kernels.encode(x, codec), codec, cols=x.shape[1], dtype=torch.float32)
    step = codec.step(x)
    error = (decoded - x.float()).abs()
    # A NaN step promises nothing: the group is NaN, or so near the end of fp32 that it may become it.
    judged = ~step.isnan()
    beyond = (~(error <= values.allowed_error(step, x, torch.float32)))[judged]
    assert not beyond.any(), f"{codec} {x.dtype}: {int(beyond.sum())} values beyond the bound"


@pytest.mark.parametrize("spec", formats.SPECS)
def test_spelling_and_kernel(spec):
    assert str(parse(spec)) == spec
    assert hash(parse(spec)) == hash(parse(str(parse(spec))))
    assert kernels.route(parse(spec), "cpu") == ("numba", "compiled for this CPU")
    assert kernels.missing(parse(spec), "cpu") is None


@pytest.mark.parametrize("dtype", values.DTYPES)
@pytest.mark.parametrize("spec", formats.SPECS)
def test_kernels_equal_specification(spec, dtype):
    for x in [*values.special(dtype).values(), values.every_pattern(dtype), torch.zeros(0, 40, dtype=dtype)]:
        assert_kernels_equal_specification(spec, x)


@settings(max_examples=300)
@given(values.matrices(), st.sampled_from(formats.SPECS))
def test_kernels_equal_specification_anywhere(x, spec):
    assert_kernels_equal_specification(spec, x)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("spec", [*formats.SPECS, *formats.PEERS])
def test_sums_are_the_specifications(spec, ranks):
    """Decode, add, encode, over payloads of several ranks; with a calibrated codec each rank has its own table."""
    for cols in (300, 256):
        mine = [formats.bound(spec, cols, rank) for rank in range(ranks)]
        x = torch.randn(ranks, 4, cols, generator=torch.Generator().manual_seed(cols))
        payloads = torch.stack([codec.encode(part) for codec, part in zip(mine, x, strict=True)])
        first, second = mine[0].formats
        for dtype in values.DTYPES:
            expected = codecs.decode_sum(payloads, first, cols, dtype)
            assert same_bytes(kernels.decode_sum(payloads, first, cols=cols, dtype=dtype), expected)
        expected = codecs.decode_sum_encode(payloads, first, second, cols)
        assert same_bytes(kernels.decode_sum_encode(payloads, first, second, cols=cols), expected)


@pytest.mark.parametrize("dtype", values.DTYPES)
@pytest.mark.parametrize("spec", [*formats.SPECS, *formats.PEERS])
def test_error_stays_within_the_published_bound(spec, dtype):
    for x in [*values.special(dtype).values(), values.every_pattern(dtype)]:
        assert_within_published_bound(formats.bound(spec, x.shape[1]), x)


@pytest.mark.parametrize("spec", [*formats.SPECS, *formats.PEERS])
def test_error_stays_within_the_published_bound_of_many_groups(spec):
    tried, group = 0, getattr(parse(spec), "group", None)
    for x in fuzz(group):
        assert_within_published_bound(formats.bound(spec, x.shape[1]), x)
        tried += x.numel() // (group or x.shape[1])
    assert tried >= FUZZ_GROUPS


def fuzz(group):
    """Rows of groups of every kind, FUZZ_GROUPS in all: from subnormal to 1e38, spikes, constants, signed zeros.

    A format without groups, `group` None, has a step per row. Its rows count, of three kinds of 32 values each, and in
    every 32nd tensor of 33 kinds.
    """
    whole_rows, group = group is None, group or 32
    counted = 1 if whole_rows else max(1, 1024 // group)
    rows = min(512, -(-FUZZ_GROUPS // counted))
    for seed in range(-(-FUZZ_GROUPS // (rows * counted))):
        per_row = counted if not whole_rows else 33 if seed % 32 == 31 else 3
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, per_row, group, generator=generator)
        kind = torch.randint(0, 6, (rows, per_row, 1), generator=generator)
        spike = torch.nn.functional.one_hot(torch.randint(0, group, (rows, per_row), generator=generator), group)
        x = torch.where(kind == 1, x + spike * 1000 * x[..., :1], x)
        x = torch.where(kind == 2, x[..., :1].expand_as(x), x)
        x = torch.where(kind == 3, x.sign() * 0.0, x)
        x = torch.where(kind == 4, x * (x > 1), x)
        x = torch.where(kind == 5, x[..., :1] + x * 1e-3, x)
        magnitude = 10.0 ** torch.randint(-44, 38, (rows, per_row, 1), generator=generator).double()
        ordinary = torch.rand(rows, per_row, 1, generator=generator) < 0.5
        x = (x.double() * torch.where(ordinary, 1.0, magnitude)).clamp(-1e38, 1e38)
        x = torch.where(torch.rand(rows, per_row, 1, generator=generator) < 0.02, x.sign() * 1e38, x)
        yield x.flatten(1).to(torch.bfloat16 if seed % 2 else torch.float32)
