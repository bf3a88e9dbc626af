"""Packed tensors: what was encoded comes back, in Python and in C, and no bytes do harm."""

import math
import os
import random
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
import torch

import flashcomm
import formats
import promises
import values
from flashcomm import packed
from flashcomm.codecs import parse

ROOT = Path(__file__).parents[2]
TRIES = int(os.environ.get("FLASHCOMM_FUZZ_GROUPS", "6000"))
SPECS = [spec for spec in formats.SPECS if not parse(spec).unbound] + ["bf16", "fp32", "none"]
IN_C = (
    *(
        "int8g128",
        "int7g100",
        "int6g128",
        "int5g32",
        "int4g128",
        "int3g32",
        "int2g32",
        "int1g7",
        "int8sg128",
        "int4sg32",
    ),
    *("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "fp8g128", "fp8g256"),
    *("ec8", "ec6", "ec5", "ec4.25", "ec4", "ec3.5", "ec3", "ec9.875", "ec2.5", "lossless", "lossless_fp16"),
    *("bf16", "fp32"),
)
SHAPES = ((), (1,), (5,), (0,), (3, 0), (0, 7), (3, 257), (2, 3, 64), (2, 1, 0, 4), (2, 1100), (1, 2, 3, 4, 5))


def heavy_tails(shape, dtype=torch.bfloat16) -> torch.Tensor:
    x = promises.tensor(1, shape, torch.float32) ** 3
    return x.to(dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_what_was_encoded_comes_back(spec):
    codec = parse(spec)
    for dtype in values.DTYPES:
        for shape in SHAPES:
            x = heavy_tails(shape, dtype)
            rows = x.reshape(math.prod(shape[:-1]), shape[-1] if shape else 1)
            want = flashcomm.decode(flashcomm.encode(rows, codec), codec, cols=rows.shape[1], dtype=dtype)
            data = flashcomm.pack(x, spec)
            got = flashcomm.unpack(data)
            assert promises.same(got, want.view(shape)), (dtype, shape)
            for kind in (bytearray, memoryview):
                assert promises.same(flashcomm.unpack(kind(data)), got)
            head = packed.read_header(data)
            assert (head.codec, head.dtype, head.shape) == (codec, dtype, shape)


def test_rows_that_vary_take_their_own_length():
    x = torch.zeros(1000, 4096, dtype=torch.bfloat16)
    assert len(flashcomm.pack(x, "lossless")) < 5000
    assert torch.equal(flashcomm.unpack(flashcomm.pack(x, "lossless")), x)


def test_any_strides():
    x = promises.tensor(0, (6, 4, 32))
    assert flashcomm.pack(x.transpose(0, 1), "int8g32") == flashcomm.pack(x.transpose(0, 1).contiguous(), "int8g32")
    assert flashcomm.pack(x.requires_grad_(), "int8g32")


@pytest.mark.parametrize(
    ("x", "codec", "says"),
    [
        (torch.zeros(4, dtype=torch.int32), "int8", "bf16, fp16 or fp32"),
        ([1.0], "int8", "bf16, fp16 or fp32"),
        (torch.zeros(4), "int4:int8", "use one of them"),
        (torch.zeros(4), "bf16/int4", "use one of them"),
        (torch.zeros(4), "int4static", "calibration"),
        (torch.zeros(4, 128), "int4g128+keep64", "calibration"),
        (torch.zeros(4), "int9", "unknown codec"),
    ],
)
def test_refusals(x, codec, says):
    with pytest.raises(ValueError, match=says):
        flashcomm.pack(x, codec)


def sealed(data: bytes) -> bytes:
    """The same bytes with a checksum that fits, as an attacker would make them."""
    crc = zlib.crc32(data[32:], zlib.crc32(data[:28]))
    return data[:28] + struct.pack("<I", crc) + data[32:]


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def test_each_field_is_checked():
    good = flashcomm.pack(torch.ones(4, 64), "int8g32")
    cases = {
        "not a packed tensor": [b"", good[:31], b"x" + good[1:]],
        "version 2": [sealed(changed(good, 4, b"\2"))],
        "damaged": [good[:-1], good + b"\0", changed(good, 40, b"\1"), changed(good, 28, b"\0\0\0\0")],
        "unknown dtype 7": [sealed(changed(good, 5, b"\7"))],
        "no tensor of shape": [sealed(changed(good, 6, b"\0")), sealed(changed(good, 6, b"\1"))],
        "take": [sealed(changed(good, 16, struct.pack("<Q", n))) for n in (3, 5, 1 << 63)],
        "unknown codec": [sealed(changed(good, 32, b"int9g32"))],
        "no spelling": [sealed(changed(good, 32, b"\xffnt8g32"))],
    }
    assert torch.equal(flashcomm.unpack(sealed(good)), torch.ones(4, 64))
    for says, examples in cases.items():
        for data in examples:
            with pytest.raises(ValueError, match=says):
                flashcomm.unpack(data)


def test_a_few_bytes_do_not_ask_for_many():
    """A row of zeros takes four bytes whatever its length."""
    good = flashcomm.pack(torch.zeros(2, 64, dtype=torch.bfloat16), "lossless")
    bomb = sealed(changed(good, 24, struct.pack("<I", (1 << 32) - 1)))
    with pytest.raises(ValueError, match="give max_bytes"):
        flashcomm.unpack(bomb, max_bytes=1 << 30)
    assert flashcomm.unpack(good, max_bytes=256).shape == (2, 64)
    with pytest.raises(ValueError, match="give max_bytes"):
        flashcomm.unpack(good, max_bytes=255)


def hostile(count: int):
    """Packed tensors with some bytes changed and a checksum that fits, and random bytes behind a good header."""
    drawn = random.Random(0)
    seeds = [
        flashcomm.pack(heavy_tails(shape, dtype), spec)
        for spec in dict.fromkeys((*IN_C, *SPECS))
        for shape, dtype in (((2, 130), torch.bfloat16), ((1, 1100), torch.float16))
    ]
    for i in range(count):
        data = bytearray(seeds[i % len(seeds)])
        kind = drawn.random()
        if kind < 0.1:
            data[64:] = drawn.randbytes(len(data) - 64)
        if kind < 0.9:
            for _ in range(drawn.choice((1, 1, 2, 8))):
                data[drawn.randrange(4, drawn.choice((32, 64, len(data))))] = drawn.randrange(256)
        else:
            del data[drawn.randrange(len(data)) :]
        yield bytes(data) if kind > 0.97 else sealed(bytes(data))


@pytest.mark.timeout(300 + TRIES // 100)
def test_hostile_bytes_are_a_clear_error_or_a_tensor():
    outcomes = {"tensor": 0, "error": 0}
    for data in hostile(TRIES):
        try:
            x = flashcomm.unpack(data, max_bytes=1 << 20)
        except ValueError:
            outcomes["error"] += 1
        else:
            assert x.numel() * x.element_size() <= 1 << 20
            outcomes["tensor"] += 1
    assert min(outcomes.values()) > TRIES // 10, outcomes


@pytest.fixture(scope="module")
def decode_in_c(tmp_path_factory):
    """Decode packed tensors with contrib/flashcomm.h: values as fp32, or None."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("c") / "decode"
    command = [compiler, "-std=c99", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'contrib'}"]
    source = [str(Path(__file__).with_name("decode.c")), "-o", str(program), "-lm"]
    sanitized = subprocess.run([*command, "-fsanitize=address,undefined", "-fno-sanitize-recover", *source])
    if sanitized.returncode:
        subprocess.run([*command, *source], check=True)

    def decode(packages: list[bytes]) -> list[torch.Tensor | None]:
        given = b"".join(struct.pack("<Q", len(data)) + data for data in packages)
        done = subprocess.run([program], input=given, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        answer, at, found = done.stdout, 0, []
        for _ in packages:
            bad, at = answer[at], at + 1
            if bad:
                found.append(None)
                continue
            (count,) = struct.unpack_from("<Q", answer, at)
            found.append(
                torch.frombuffer(bytearray(answer[at + 8 :][: 4 * count] + b"\0" * 4), dtype=torch.float32)[:-1]
            )
            at += 8 + 4 * count
        assert at == len(answer)
        return found

    return decode


@pytest.mark.parametrize("spec", IN_C)
def test_the_decoder_in_c_gives_the_values_of_the_specification(spec, decode_in_c):
    xs = [heavy_tails(shape) for shape in ((3, 257), (2, 1100), (1, 1), (1, 5), (2, 1024), (2, 130))]
    xs += [heavy_tails((2, 256), dtype) * scale for dtype in (torch.float16, torch.float32) for scale in (1, 1e-6, 1e3)]
    special = torch.tensor([0.0, -0.0, 1e-40, 3e38, float("inf"), float("nan"), -1.0, 2.0])
    xs += [
        special.repeat(2, 32),
        torch.zeros(2, 64),
        special[:4].repeat(3, 33),
        heavy_tails((0, 4)),
        heavy_tails((4, 0)),
    ]
    for x, got in zip(xs, decode_in_c([flashcomm.pack(x, spec) for x in xs]), strict=True):
        assert got is not None
        cols = x.shape[-1]
        want = parse(spec).decode(flashcomm.encode(x, spec), cols, torch.float32).flatten()
        assert promises.same(want.nan_to_num(7.0), got.nan_to_num(7.0)), (x.shape, x.dtype)
        assert torch.equal(want.isnan(), got.isnan())


@pytest.mark.timeout(300 + TRIES // 100)
def test_hostile_bytes_do_not_harm_the_decoder_in_c(decode_in_c):
    packages = list(hostile(TRIES))
    decoded = decode_in_c(packages)
    assert TRIES // 10 < sum(one is not None for one in decoded) < TRIES * 9 // 10
