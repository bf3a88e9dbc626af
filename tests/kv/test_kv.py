"""Keys and values: what was encoded comes back, from every layout, and no bytes do harm."""

import math
import random
import struct
import zlib

import pytest
import torch

import flashcomm
import promises
import values
from flashcomm import kv
from flashcomm.integrations.loaded import cache_name

CODECS = ("lossless", "none", "ec4:ec3", "int4g64", "int8g64+hadamard:int4g64", "mxfp4")


def keys_and_values(shape=(2, 3, 70, 8), dtype=torch.bfloat16, channels: int = 0) -> kv.KV:
    k = promises.tensor(1, shape, torch.float32)
    v = promises.tensor(2, (*shape[:-1], channels or shape[-1]), torch.float32)
    # Channels of keys differ in magnitude.
    return kv.KV((k * torch.logspace(-2, 1, shape[-1])).to(dtype), v.to(dtype))


def by_token(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-3, -2).flatten(-2)


@pytest.mark.parametrize("spec", CODECS)
def test_what_was_encoded_comes_back_by_channel_or_by_token(spec):
    first, second = flashcomm.codec(spec).formats

    def rounded(x: torch.Tensor, codec: flashcomm.Codec) -> torch.Tensor:
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        payload = flashcomm.encode(rows, codec)
        return flashcomm.decode(payload, codec, cols=x.shape[-1], dtype=x.dtype).view(x.shape)

    for dtype in values.DTYPES:
        for shape, channels in (((3, 70, 8), 0), ((2, 1, 130, 16), 12), ((2, 0, 8), 0), ((1, 3, 1, 1), 0)):
            k, v = keys_and_values(shape, dtype, channels)
            got = kv.decode(kv.encode(k, v, spec))
            if str(first).startswith("ec"):
                assert promises.same(by_token(got.k), rounded(by_token(k), first)), (dtype, shape)
            else:
                assert promises.same(got.k, rounded(k.mT, first).mT), (dtype, shape)
            assert promises.same(by_token(got.v), rounded(by_token(v), second)), (dtype, shape)


def test_any_strides():
    # Where several tensors share memory, as in a cache that has room for more tokens, or holds tokens before heads.
    k, v = keys_and_values((3, 70, 8))
    roomy = torch.zeros(3, 100, 16, dtype=k.dtype)
    roomy[:, :70, :8], roomy[:, :70, 8:] = k, v
    by_token = k.transpose(0, 1).contiguous().transpose(0, 1)
    want = kv.encode(k, v, "int4g64")
    assert kv.encode(roomy[:, :70, :8], roomy[:, :70, 8:], "int4g64") == want
    assert kv.encode(by_token, v, "int4g64") == want


def test_a_channel_that_is_large_does_not_cost_the_others():
    """A negative control of the arrangement: by token, as V is, the same codec loses the small channels."""
    k, _ = keys_and_values((1, 512, 64), torch.float32)

    def error(x: torch.Tensor) -> float:
        small = (x - k)[..., :16]
        return (small.square().mean() / k[..., :16].square().mean()).sqrt().item()

    found = kv.decode(kv.encode(k, k, "int4g64"))
    assert error(found.k) < 0.1
    assert error(found.v) > 1


def test_a_cache_of_transformers():
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    ids = torch.randint(50, (2, 20))
    with torch.inference_mode():
        name = cache_name(model.forward)
        cache = getattr(model(ids[:, :-1], use_cache=True), name)
        sent = [kv.encode(layer.keys, layer.values) for layer in cache.layers]
        want = model(ids[:, -1:], **{name: cache}).logits
        got = model(ids[:, -1:], **{name: DynamicCache([kv.decode(data) for data in sent])}).logits
    assert torch.equal(got, want)


def test_a_chunk_of_lmcache():
    chunk = torch.stack(keys_and_values((3, 40, 16)))
    assert torch.equal(kv.deserialize(kv.serialize(chunk)), chunk)
    k, v = kv.decode(kv.serialize(chunk, "ec5"))
    assert torch.equal(kv.deserialize(kv.serialize(chunk, "ec5")), torch.stack((k[:, 0], v[:, 0])))
    with pytest.raises(ValueError, match="no chunk of LMCache"):
        kv.deserialize(kv.encode(*keys_and_values()))


K = torch.zeros(2, 5, 8)


@pytest.mark.parametrize(
    ("k", "v", "codec", "says"),
    [
        (K[0], K[0], "none", "without heads, unsqueeze"),
        ([1.0], K, "none", "k is"),
        (K, K[:, :4], "none", "these differ in more"),
        (K, K.bfloat16(), "none", "these differ in more"),
        (K[:0], K[:0], "none", "0 heads"),
        (K, K, "int9", "unknown codec"),
        (K, K, "bf16/int4:int8", "4 formats: give one"),
        (K, K, "int4static", "calibration"),
        (K.int(), K.int(), "none", "bf16, fp16 or fp32"),
    ],
)
def test_refusals(k, v, codec, says):
    with pytest.raises(ValueError, match=says):
        kv.encode(k, v, codec)


def sealed(data: bytes, at: int, new: bytes) -> bytes:
    """Other bytes in the header, with a checksum that fits, as an attacker would make them."""
    head = (data[:at] + new + data[at + len(new) :])[:28]
    return head + struct.pack("<I", zlib.crc32(head)) + data[32:]


def test_each_field_is_checked():
    good = kv.encode(K, K, "int8g8")
    k_bytes = struct.unpack_from("<Q", good, 8)[0]
    assert torch.equal(kv.decode(good).k, K)
    other = kv.encode(K, K[..., :4], "int8g8")
    swapped = sealed(good[:32] + good[32 + k_bytes :] + good[32:][:k_bytes], 8, good[16:24] + good[8:16])
    for says, data in (
        ("no keys and values", good[:31]),
        ("that begin with", b"x" + good[1:]),
        ("in version 2", sealed(good, 4, b"\2")),
        ("does not fit its checksum", good[:6] + b"\3" + good[7:]),
        ("where the header tells of", good + b"\0"),
        ("where the header tells of", sealed(good, 8, other[8:24])),
        ("damaged", sealed(good, 8, struct.pack("<QQ", k_bytes - 1, len(good) - 31 - k_bytes))),
        ("does not fit its checksum", sealed(good, 5, b"\2")),
        ("of 2 heads", sealed(good, 5, b"\0")),
        ("are no keys and values of 4 heads", sealed(good, 6, b"\4")),
        ("of 0 heads", sealed(good, 6, b"\0\0")),
        ("of 2 heads", swapped),
        ("the checksum does not fit", good[:-1] + b"\x55"),
    ):
        with pytest.raises(ValueError, match=says):
            kv.decode(data)


def test_a_few_bytes_do_not_ask_for_many():
    zeros = torch.zeros(1, 1, 1000, 64, dtype=torch.bfloat16)
    data = kv.encode(zeros, zeros)
    assert len(data) < 5000
    with pytest.raises(ValueError, match="give max_bytes"):
        kv.decode(data, max_bytes=255_999)
    assert kv.decode(data, max_bytes=256_000).k.shape == zeros.shape


def resealed(data: bytes) -> bytes:
    """The same bytes with checksums that fit, of K's and V's packed tensors too."""
    k_bytes = struct.unpack_from("<Q", data, 8)[0]
    parts = data[32:][:k_bytes], data[32:][k_bytes:]
    sums = (struct.pack("<I", zlib.crc32(part[32:], zlib.crc32(part[:28]))) for part in parts)
    return sealed(data, 0, b"")[:32] + b"".join(
        part[:28] + crc + part[32:] for part, crc in zip(parts, sums, strict=True)
    )


def test_hostile_bytes_are_a_clear_error_or_keys_and_values():
    drawn, outcomes = random.Random(0), {True: 0, False: 0}
    seeds = [kv.encode(*keys_and_values((2, 2, 20, 8)), spec) for spec in CODECS]
    for i in range(2000):
        data = bytearray(seeds[i % len(seeds)])
        at = drawn.randrange(4, drawn.choice((28, len(data))))
        data[at] = drawn.randrange(256)
        try:
            found = kv.decode(resealed(bytes(data)), max_bytes=1 << 20)
        except ValueError:
            outcomes[False] += 1
        else:
            assert sum(x.numel() * x.element_size() for x in found) <= 1 << 20
            outcomes[True] += 1
    assert min(outcomes.values()) > 20, outcomes
