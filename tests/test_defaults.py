"""A program's defaults (device, dtype) change nothing of ours: every tensor that we make names its own."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

import flashcomm
import formats
import promises
import ranks
from calls import new_group
from flashcomm import kernels
from flashcomm.kernels.routes import _load

SOURCES = Path(flashcomm.__file__).parent
# Those that the default device changes, and those that the default dtype alone changes.
FACTORIES = {function.__name__ for function in _device_constructors()} | {"normal", "Tensor", "FloatTensor"}


def nameless(source: str) -> list[str]:
    """Calls of a factory of torch that name no device or no dtype."""
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).removeprefix("torch.") in FACTORIES
        and ast.unparse(call.func).startswith("torch.")
        and not {"device", "dtype"} <= {word.arg for word in call.keywords}
    ]


def test_every_tensor_that_we_make_names_its_device_and_dtype():
    found = {str(path): nameless(path.read_text()) for path in sorted(SOURCES.rglob("*.py"))}
    assert not {path: calls for path, calls in found.items() if calls}


def test_the_check_of_factories_can_fail():
    assert nameless("torch.zeros(3, dtype=torch.uint8)\nx = torch.tensor([1.0], device=d)") == [
        "line 1: torch.zeros(3, dtype=torch.uint8)",
        "line 2: torch.tensor([1.0], device=d)",
    ]
    assert not nameless("torch.zeros(3, dtype=torch.uint8, device=d)")


@contextlib.contextmanager
def defaults(*, dtype=torch.float32, device=None):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


DEFAULTS = {"float64": {"dtype": torch.float64}, "meta": {"device": "meta"}}


def figures(spec: str) -> list[torch.Tensor]:
    """Everything that a codec computes from two messages, by the specification and by its kernel."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(3, 300, generator=generator, dtype=torch.float32, device="cpu").bfloat16() for _ in range(2)]
    reach = torch.stack([x.float().abs().amax(0) for x in (*xs, xs[0] + xs[1])])
    codec = flashcomm.codec(spec).bind(flashcomm.codecs.Features(reach), 0)
    payloads = torch.stack([codec.encode(x) for x in xs])
    return [
        payloads,
        torch.stack([kernels.encode(x, codec) for x in xs]),
        codec.decode(payloads[0], 300, torch.float32),
        codec.step(xs[0]),
        kernels.decode_sum(payloads, codec, cols=300, dtype=torch.float32),
        kernels.decode_sum_encode(payloads, codec, codec, cols=300),
        flashcomm.codecs.decode_sum_encode(payloads, codec, codec, 300),
    ]


@pytest.mark.parametrize("which", DEFAULTS)
@pytest.mark.parametrize("spec", ["bf16", "fp32", *formats.SPECS])
def test_codecs_do_not_depend_on_defaults(spec, which):
    _load.cache_clear()
    with defaults(**DEFAULTS[which]):
        got = figures(spec)
    for a, b in zip(got, figures(spec), strict=True):
        assert promises.same(a, b)


def verbs_under(which: str):
    """Ranks that have never met, of which only the last has other defaults."""
    size, rank = dist.get_world_size(), dist.get_rank()
    xs = [promises.tensor(r, (2 * size, 256)) for r in range(size)]
    into = torch.zeros(256, 2 * size, dtype=torch.bfloat16)
    found = []
    for changed in ({}, DEFAULTS[which] if rank == size - 1 else {}):
        group = new_group()
        with defaults(**changed):
            results = [
                flashcomm.all_reduce(xs[rank], spec, group, algorithm=algorithm)
                for spec in ("int8g128", "int4g128+taco", "mxfp4")
                for algorithm in ("auto", "one_step", "two_step", "plain")
            ]
            results.append(flashcomm.all_reduce(xs[rank], "int8g128", group, algorithm="two_step", out=into.t()))
            results.append(
                flashcomm.all_reduce(xs[rank], "int8g128", group, algorithm="two_step", async_op=True).wait()
            )
            results += [verb(xs[rank], "int4g32", group) for verb in (flashcomm.reduce_scatter, flashcomm.all_gather)]
            results.append(flashcomm.all_to_all(xs[rank], "int4g32", group))
            found.append([result.clone() for result in results])
    assert all(promises.same(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("by", ranks.WAYS)
@pytest.mark.parametrize("which", DEFAULTS)
def test_verbs_do_not_depend_on_defaults(which, by):
    ranks.shared(2, by=by).run(verbs_under, which)
