"""Entropy-coded rows: size, bound, a second encoding without loss, NaN, broken payloads, and tables."""

import numpy as np
import pytest
import torch

import values
from flashcomm import kernels
from flashcomm.codecs import Entropy, decode_sum_encode, entropy_layout, entropy_rate, parse
from flashcomm.codecs.entropy_tables import EDGES, ESCAPES, LENGTHS, MANTISSAS

NAMES = ("ec2.5", "ec3", "ec3.5", "ec4.25", "ec6", "ec8", "ec10")


def roundtrip(codec, x):
    return codec.decode(codec.encode(x), x.shape[1], torch.float32)


def kinds(cols, seed=0):
    """A row of each kind: Gaussian, heavy tails, outliers, equal, two values, sparse, on a grid, zeros, huge, tiny."""
    generator = torch.Generator().manual_seed(1000 * seed + cols)
    x = torch.randn(14, cols, generator=generator)
    x[1] /= x[2].abs().clamp_min(1e-2)
    x[2, cols // 2] = 23_740.0
    x[3] = -1.5
    x[4] = x[4].sign() * 3.7
    x[5, 1:] = 0
    x[6] = x[6] * (x[6] > 1.5)
    x[7] = torch.round(3 * x[7]) * 0.125
    x[8] = 0
    x[9] *= 1e37
    x[10] *= 1e-37
    x[11] = torch.round(x[11] * 500) * 2.0**-20
    x[12] = 100 + 0.01 * x[12]
    x[13] = x[13] * 10.0 ** torch.randint(-12, 12, (cols,), generator=generator)
    return x


def assert_bounded_and_stable(codec, x):
    payload = kernels.encode(x, codec)
    assert payload.shape == (len(x), codec.payload_bytes(x.shape[1]))
    decoded = kernels.decode(payload, codec, cols=x.shape[1], dtype=torch.float32)
    step = codec.step(x)
    judged = ~step.isnan()
    error = (decoded - x.float()).abs()
    assert (error <= values.allowed_error(step, x, torch.float32))[judged].all(), f"{codec} {x.shape}"
    assert decoded[~judged].isnan().all()
    again = kernels.encode(decoded, codec)
    differing = (again != payload).any(1).nonzero().flatten().tolist()
    assert not differing, f"{codec} {list(x.shape)}: rows {differing} change when they are encoded again"


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_length_are_bounded_and_survive_a_second_encoding(name):
    lengths = range(1, 301) if name == "ec4.25" else (1, 2, 3, 31, 100, 300)
    for cols in lengths:
        assert_bounded_and_stable(parse(name), kinds(cols))


@pytest.mark.parametrize("cols", [1023, 1024, 1025, 4096])
def test_rows_of_four_streams(cols):
    for name in ("ec3", "ec4.25", "ec8"):
        assert_bounded_and_stable(parse(name), kinds(cols))


@pytest.mark.parametrize("dtype", values.DTYPES)
def test_special_values_and_every_pattern(dtype):
    for x in [*values.special(dtype).values(), values.every_pattern(dtype)]:
        assert_bounded_and_stable(parse("ec5"), x)


def test_a_payload_has_exactly_the_bits_of_its_name():
    for name in NAMES:
        codec = parse(name)
        assert codec.bits_per_value(4096) == codec.bits_per_value(576) == float(name[2:])
        assert codec.payload_bytes(1) == 16
        assert codec.payload_bytes(0) == 0
        assert codec.encode(torch.zeros(3, 0)).shape == (3, 0)
        assert codec.segment(4096) == 4096


@pytest.mark.parametrize(("spelling", "canonical"), [("ec4.250", "ec4.25"), ("ec8.0", "ec8"), ("ec2.625", "ec2.625")])
def test_spellings(spelling, canonical):
    assert str(parse(spelling)) == canonical
    assert parse(spelling) == parse(canonical)


@pytest.mark.parametrize("spelling", ["ec4.3", "ec2", "ec10.125", "ec", "ec-4", "ec1e1", "ec04.26"])
def test_other_sizes_are_refused_with_those_that_are_allowed(spelling):
    with pytest.raises(ValueError, match=r"ec2.5 to ec10 in eighths of a bit such as ec4.25"):
        parse(spelling)


def test_a_codec_made_directly_says_what_is_allowed():
    with pytest.raises(ValueError, match=r"2.5 to 10 bits per value, in eighths.*not 2"):
        Entropy(16)


def test_transforms_in_front_are_refused():
    for suffix in ("hadamard", "taco", "spike"):
        with pytest.raises(ValueError, match="ec4"):
            parse(f"ec4+{suffix}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_bad_value_spoils_its_row_and_no_other(bad):
    codec, x = parse("ec4.25"), torch.randn(3, 576, generator=torch.Generator().manual_seed(0))
    clean = codec.encode(x)
    x[1, 100] = bad
    payload = codec.encode(x)
    assert torch.equal(payload[[0, 2]], clean[[0, 2]])
    for dtype in values.DTYPES:
        assert codec.decode(payload, 576, dtype)[1].isnan().all()
        assert not codec.decode(payload, 576, dtype)[[0, 2]].isnan().any()
    assert codec.step(x)[1].isnan().all()


def test_a_gpu_runs_the_specification_and_says_so():
    assert kernels.route(parse("ec4.25"), "cpu") == ("numba", "compiled for this CPU")
    assert kernels.route(parse("ec4.25"), "cuda") == ("torch", "no GPU kernel for ec4.25")


def test_kernels_equal_specification_in_rows_of_every_kind():
    for name in ("ec2.5", "ec4.25", "ec6", "ec10"):
        codec = parse(name)
        for cols in (1, 17, 300, 1023, 1025, 2048):
            x = kinds(cols)
            payload = codec.encode(x)
            assert torch.equal(kernels.encode(x, codec), payload), f"{name} {cols}"
            decoded = kernels.decode(payload, codec, cols=cols, dtype=torch.float32)
            assert torch.equal(decoded, codec.decode(payload, cols, torch.float32)), f"{name} {cols}"


def test_kernels_read_broken_payloads_within_their_memory():
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        for cols in (1, 40, 577, 1100):
            size = parse(name).payload_bytes(cols)
            payload = torch.randint(0, 256, (200, size), generator=generator).to(torch.uint8)
            assert kernels.decode(payload, name, cols=cols, dtype=torch.bfloat16).shape == (200, cols)


def test_rows_do_not_depend_on_their_neighbours():
    codec, x = parse("ec3.5"), kinds(576)
    assert torch.equal(codec.encode(x), torch.cat([codec.encode(row[None]) for row in x]))


def test_a_sum_of_one_rank_is_rounded_once():
    """The embedding of a vocabulary-parallel model: one rank has the row, the others have zeros."""
    codec = parse("ec4.25")
    for cols in (576, 2048):
        x = torch.randn(64, cols, generator=torch.Generator().manual_seed(cols)).bfloat16()
        owner = torch.arange(64) % 3
        payloads = torch.stack([codec.encode(torch.where((owner == r)[:, None], x, 0)) for r in range(3)])
        assert torch.equal(decode_sum_encode(payloads, codec, codec, cols), codec.encode(x))


def test_an_outlier_costs_its_bits_once():
    codec, x = parse("ec4.25"), torch.randn(50, 4096, generator=torch.Generator().manual_seed(0))
    alone = (roundtrip(codec, x) - x).square().mean()
    x[:, 507] = 23_740.0
    rest = torch.arange(4096) != 507
    assert (roundtrip(codec, x) - x)[:, rest].square().mean() < 1.03 * alone


@pytest.mark.parametrize(("name", "decibels"), [("ec3", 15.3), ("ec4.25", 23.1), ("ec6", 33.7), ("ec8", 45.8)])
def test_gaussian_rows_are_near_the_theory(name, decibels):
    """6.02 B - 1.53 dB is the least error of uniform steps; headers, whole bits and the ladder cost a decibel."""
    x = torch.randn(50, 4096, generator=torch.Generator().manual_seed(0))
    error = roundtrip(parse(name), x) - x
    got = 10 * torch.log10(x.square().mean() / error.square().mean()).item()
    assert decibels <= got <= 6.02 * float(name[2:]) - 1.53


def test_broken_payloads_decode_to_something():
    generator = torch.Generator().manual_seed(0)
    for name, cols in (("ec3", 7), ("ec4.25", 576), ("ec8", 1100)):
        codec = parse(name)
        payload = torch.randint(0, 256, (40, codec.payload_bytes(cols)), generator=generator).to(torch.uint8)
        assert codec.decode(payload, cols, torch.float32).shape == (40, cols)


def huffman_bits(symbols, weights):
    """Bits that the Huffman coder of `constriction` takes for symbols of these weights."""
    symbol = pytest.importorskip("constriction").symbol
    tree, coder = symbol.huffman.EncoderHuffmanTree(weights), symbol.QueueEncoder()
    for one in symbols:
        coder.encode_symbol(one, tree)
    return coder.get_compressed_and_bitrate()[1]


@pytest.mark.parametrize("table", range(len(LENGTHS)))
def test_codes_are_as_short_as_those_of_an_independent_huffman_coder(table):
    """Against `constriction`, which knows the frequencies, on samples of the distribution that the table is for."""
    lengths = np.array([*LENGTHS[table], ESCAPES[table]])
    assert (np.diff(LENGTHS[table]) >= 0).all()
    assert (2.0 ** (entropy_layout.PEEK - lengths)).sum() == 1 << entropy_layout.PEEK
    assert [huffman_bits([s], 2.0**-lengths) for s in range(len(lengths))] == lengths.tolist()
    generator = np.random.default_rng(table)
    magnitude = generator.gamma(1 / 1.5, size=20_000) ** (1 / 1.5)
    q = np.round(magnitude / magnitude.mean() * 2 ** ((table - 4) / 4) * generator.choice([-1, 1], 20_000)).astype(int)
    symbols = np.minimum(np.where(q > 0, 2 * q, -2 * q - (q < 0)), len(lengths) - 1)
    theirs = huffman_bits(symbols, np.bincount(symbols, minlength=len(lengths)) / 20_000.0)
    assert theirs <= lengths[symbols].sum() < theirs + 0.012 * 20_000


def test_rows_take_hardly_more_bits_than_an_independent_entropy_coder():
    """Against the range coder of `constriction`, with the frequencies of the row's own codes."""
    constriction = pytest.importorskip("constriction")
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    for name in ("ec3.5", "ec4.25", "ec6"):
        codec = parse(name)
        _, coded, _ = entropy_rate.choose(x, codec.payload_bytes(4096))
        for q, bits in zip(coded.q.numpy(), coded.bits.tolist(), strict=True):
            shifted = (q - q.min()).astype(np.int32)
            model = constriction.stream.model.Categorical(np.bincount(shifted) / 4096, perfect=False)
            coder = constriction.stream.queue.RangeEncoder()
            coder.encode(shifted, model)
            # The row's own frequencies, which are not sent, are worth a few hundredths of a bit to the other coder.
            assert 0 < bits / 4096 - coder.num_bits() / 4096 < 0.08


def test_steps_are_a_ladder_whose_reciprocals_are_nearly_exact():
    m = np.array(MANTISSAS, np.int32).view(np.float32).astype(np.float64)
    assert np.abs(m / 2 ** (np.arange(16) / 16) - 1).max() < 6e-4
    reciprocal = (1 / m).astype(np.float32).astype(np.float64)
    assert np.abs(reciprocal * m - 1).max() < 2.0**-35
    assert list(EDGES) == sorted(EDGES)
