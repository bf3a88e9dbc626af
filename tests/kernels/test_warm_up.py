"""No kernel of a GPU is compiled while a server serves: what `warm_up` calls is all that sums of any length need.

Counted without a GPU. The algorithms run as over NCCL, on one rank and without values; a launch is looked at as Triton
does when it asks whether it must compile, and by the macros of the CUDA C++ kernels.
"""

import pytest
import torch

from flashcomm import codecs, kernels
from flashcomm.collectives import algorithms
from flashcomm.kernels import eager, verbs, warm
from flashcomm.transports.backend import Backend
from flashcomm.transports.base import Ranks
from flashcomm.transports.buffers import Buffers
from flashcomm.transports.bulk import Bulk

pytest.importorskip("triton")
from flashcomm.kernels import gpu
from flashcomm.kernels.gpu import cuda
from flashcomm.kernels.gpu import launch as triton_launch
from flashcomm.kernels.gpu.cuda import launch as cuda_launch
from flashcomm.kernels.gpu.tiles.move import move

CPU = torch.device("cpu")
TOKENS = [*range(1, 300), *range(300, 4096, 233), 4095, 4096]
"""Whether a distance is a multiple of 16 bytes depends on the number of tokens by 16 R, which is 128 at most."""


class Looked:
    """Stands for `move`: what Triton would compile, and how often it was launched."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import JITFunction, create_function_from_signature

        kernel = JITFunction(move.fn, do_not_specialize=["ranks"])
        target = make_backend(GPUTarget("cuda", 90, 32))
        self._bind = create_function_from_signature(kernel.signature, kernel.params, target)
        self.variants, self.launches = set(), 0

    def __getitem__(self, grid):
        def look(*args, num_warps, enable_fp_fusion, **constants):
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            _, specialization, _ = self._bind(*args, **constants, **options)
            self.variants.add(str((specialization, num_warps)))
            self.launches += 1

        return look


class Nothing(Backend):
    """Operations of a backend that move nothing."""

    def __init__(self):
        pass

    def gather(self, received, sent):
        """See `Backend`."""

    def exchange(self, received, sent):
        """See `Backend`."""

    def broadcast(self, x, root):
        """See `Backend`."""


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """CPU tensors take the kernels of GPUs; returns what records the launches of one implementation."""

    def use(implementation):
        for module, name in ((eager, "implementation"), (verbs, "common_implementation")):
            monkeypatch.setattr(module, name, lambda *_: implementation)
        monkeypatch.setattr(algorithms, "cut", lambda rows, cols, *_: (rows, cols))
        looked = Looked()
        monkeypatch.setattr(triton_launch, "move", looked)

        def by_macros(source, source_format, target, target_format, cols):
            *_, macros = cuda_launch.plan(source, source_format, target, target_format, cols)
            looked.variants.add(macros)
            looked.launches += 1

        monkeypatch.setattr(cuda_launch, "_move", by_macros)
        return looked

    return use


def serve(codec, hidden, ranks, tokens, pieces=1):
    """The sums of prompts of so many tokens, in both algorithms."""
    messages = Bulk(Nothing(), Ranks(rank=0, world_size=ranks, timeout_s=1.0, tell=lambda fact: [fact]), Buffers())
    x, out = (torch.empty(max(tokens), hidden, dtype=torch.bfloat16) for _ in range(2))
    for count in tokens:
        for name in ("two_step", "one_step") if len(set(codec.formats)) == 1 else ("two_step",):
            algorithms.ALGORITHMS[name](x[:count], out[:count], codec, messages, pieces)


@pytest.mark.parametrize(
    ("implementation", "spec", "hidden", "most"),
    [
        (gpu, "int8g128", 4096, 3),
        (gpu, "int4g128:int8g128", 5120, 5),
        # Rows of 2,972 bytes.
        (gpu, "int8g128", 2880, 16),
        (cuda, "int4g128", 4096, 4),
        (cuda, "int8g128", 2944, 16),
    ],
)
def test_prompts_of_1_to_4096_tokens_compile_nothing_after_warm_up(implementation, spec, hidden, most, as_on_a_gpu):
    looked, codec = as_on_a_gpu(implementation), codecs.parse(spec)
    made = warm._call_all(codec, hidden, torch.bfloat16, CPU)
    ready = set(looked.variants)
    assert len(ready) <= most
    assert len(ready) <= len(made)
    for ranks in (2, 4, 8):
        looked.launches = 0
        serve(codec, hidden, ranks, TOKENS if ranks == 8 else TOKENS[::7])
        # Three kernels in two steps, two in one.
        each = 5 if len(set(codec.formats)) == 1 else 3
        assert looked.launches == each * len(TOKENS if ranks == 8 else TOKENS[::7])
    serve(codec, hidden, 4, TOKENS[4:200:9], pieces=3)
    assert looked.variants - ready == set()


def test_without_warm_up_they_would_compile(as_on_a_gpu):
    looked = as_on_a_gpu(gpu)
    serve(codecs.parse("int8g128"), 2880, 4, TOKENS[:40])
    assert len(looked.variants) > 4


def test_what_a_gpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(warm, "any_missing", lambda codec, device: None)
    called = []
    monkeypatch.setattr(warm, "_call_all", lambda *given: called.append(given) or ["int8g128: encode"])
    assert kernels.warm_up("int8g128", 4096, device="cuda:1") == ["int8g128: encode"]
    assert called == [(codecs.parse("int8g128"), 4096, torch.bfloat16, torch.device("cuda:1"))]
    with pytest.raises(ValueError, match="give hidden"):
        kernels.warm_up("int8g128", device="cuda")
    assert kernels.warm_up("none", 4096, device="cuda") == []
