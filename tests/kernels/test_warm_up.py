"""No kernel of a GPU is compiled while a server serves: what `warm_up` calls is all that sums of any length need.

Counted without a GPU. The algorithms run as over NCCL, on one rank and without values; a launch is looked at as Triton
does when it asks whether it must compile, and by the macros of the CUDA C++ kernels.
"""

import itertools
from contextlib import nullcontext

import pytest
import torch

from flashcomm import codecs, kernels
from flashcomm.collectives import algorithms
from flashcomm.kernels import eager, verbs, warm
from flashcomm.transports.backend import Backend
from flashcomm.transports.base import Ranks, Task
from flashcomm.transports.buffers import Buffers
from flashcomm.transports.bulk import Bulk
from flashcomm.transports.symmetric.memory import SymmetricMemory

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
    """Stands for a kernel: what Triton would compile, and how often it was launched."""

    def __init__(self, kernel=move):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import JITFunction, create_function_from_signature

        # The arguments of its decorator, as the interpreter keeps them.
        if not isinstance(kernel, JITFunction):
            kernel = JITFunction(kernel.fn, **kernel.rewriter.kwargs)
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

    def warmup(self, *args, grid, **constants):
        """Compile without a launch."""
        self[grid](*args, **constants)
        self.launches -= 1


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


@pytest.fixture
def one_launch(monkeypatch):
    """Symmetric memory of 4 ranks; returns it, its kernels in Triton by algorithm, and the macros given to C++."""
    from flashcomm.transports.symmetric import collective, exchange, launch

    looked = {name: Looked(getattr(exchange, name)) for name in ("one_step", "two_step")}
    monkeypatch.setattr(launch, "_KERNELS", looked)
    monkeypatch.setattr(launch.kernels, "any_missing", lambda codec, device: None)
    both = {"rank": 1, "size_bytes": 32 << 20, "lost": torch.zeros(1, dtype=torch.int32)}
    addresses = torch.zeros(4, dtype=torch.int64)
    hot = collective.Peers(memory=addresses, state=torch.zeros(4, dtype=torch.int64), processors=132, **both)
    peers = launch.Peers(buffers=addresses, epochs=torch.zeros(2, launch.BLOCKS, dtype=torch.int32), **both)
    compiled = set()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(collective.driver, "make_current", lambda index: None)
    monkeypatch.setattr(collective.driver, "kernel", lambda macros, *_: compiled.add(macros))
    return SymmetricMemory(peers, hot), looked, compiled


def algorithms_of(spec):
    """A pair of formats has two steps."""
    return ["two_step"] if ":" in spec else ["two_step", "one_step"]


def sum_of(spec, rows, cols, name):
    return Task(
        name=name, codec=codecs.parse(spec), rows=rows, cols=cols, dtype=torch.bfloat16, out_dtype=torch.bfloat16,
        device=CPU,
    )  # fmt: skip


@pytest.mark.parametrize("spec", ["int8g128", "int4g32", "nvfp4", "int4g128:int8g128"])
def test_after_its_first_sum_a_launch_in_triton_compiles_nothing(spec, one_launch):
    from flashcomm.transports.symmetric import launch

    memory, looked, _ = one_launch
    memory.load(sum_of(spec, 3, 4096, "two_step"))
    names = algorithms_of(spec)
    one_each = {name: int(name in names) for name in looked}
    assert {name: len(kernel.variants) for name, kernel in looked.items()} == one_each
    assert not any(kernel.launches for kernel in looked.values())
    x = torch.empty(4096, 4096, dtype=torch.bfloat16)
    for tokens, name in itertools.product(TOKENS, names):
        launch.all_reduce(x[:tokens], codecs.parse(spec), memory._peers, x[:tokens], name)
    assert {name: len(kernel.variants) for name, kernel in looked.items()} == one_each
    assert all(looked[name].launches >= len(TOKENS) for name in names)


@pytest.mark.parametrize("spec", ["int8g128", "int4g128+hadamard", "int4g128:int8g128"])
def test_after_its_first_sum_a_launch_in_cuda_compiles_nothing(spec, one_launch, monkeypatch):
    from flashcomm.transports.symmetric import collective

    memory, looked, compiled = one_launch
    monkeypatch.setattr(collective.cuda, "why_not", lambda codec: None)
    memory.load(sum_of(spec, 3, 4096, "two_step"))
    assert len(compiled) == (3 if len(algorithms_of(spec)) == 2 else 1)
    assert not any(kernel.variants for kernel in looked.values())
    x, used = torch.empty(4096, 4096, dtype=torch.bfloat16), set()
    for tokens, name in itertools.product(TOKENS, algorithms_of(spec)):
        made = collective.launches(name, codecs.parse(spec), x[:tokens], x[:tokens], memory._hot)
        used |= {launch.macros for launch in made}
    assert used == compiled


def test_what_a_gpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(warm, "any_missing", lambda codec, device: None)
    called = []
    monkeypatch.setattr(warm, "_call_all", lambda *given: called.append(given) or ["int8g128: encode"])
    assert kernels.warm_up("int8g128", 4096, device="cuda:1") == ["int8g128: encode"]
    assert called == [(codecs.parse("int8g128"), 4096, torch.bfloat16, torch.device("cuda:1"))]
    with pytest.raises(ValueError, match="give hidden"):
        kernels.warm_up("int8g128", device="cuda")
    assert kernels.warm_up("none", 4096, device="cuda") == []
