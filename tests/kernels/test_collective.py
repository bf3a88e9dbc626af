"""Collectives in one launch in CUDA C++, on the CPU: the bits of the specification, whoever comes when."""

import dataclasses
import itertools

import pytest
import torch

import flashcomm
import promises
from flashcomm import codecs

pytest.importorskip("triton")
import cuda_on_cpu
from flashcomm.bench import sass
from flashcomm.kernels.gpu.cuda import compiler
from flashcomm.transports.base import Task
from flashcomm.transports.symmetric import collective
from thorough import thorough

needs_compiler = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")

BEFORE = collective._FLAGS_BYTES + collective._LINES_BYTES


class World:
    """Ranks that share this process's memory, with room for `half_bytes` in a launch."""

    def __init__(self, ranks: int, half_bytes: int = 1 << 17, processors: int = 2, patience: int = 1 << 30):
        self.memory = torch.zeros(ranks, BEFORE + 2 * half_bytes, dtype=torch.uint8)
        table = torch.tensor([part.data_ptr() for part in self.memory])
        self.peers = [
            collective.Peers(
                rank=rank,
                memory=table,
                size_bytes=self.memory.shape[1],
                state=torch.zeros(4, dtype=torch.int64),
                lost=torch.zeros(1, dtype=torch.int32),
                processors=processors,
                patience=patience,
            )
            for rank in range(ranks)
        ]

    def launches(self, name, codec, xs, outs, splits=None):
        """What each rank launches, one list for each launch."""
        made = [
            [*collective.launches(name, codec, x, out, peers, splits[peers.rank] if splits else None)]
            for x, out, peers in zip(xs, outs, self.peers, strict=True)
        ]
        return [list(each) for each in zip(*made, strict=True)]

    def run(self, kernels, *call, seed=0, splits=None):
        """Run a collective; return the number of launches."""
        made = self.launches(*call, splits)
        for each in made:
            kernels.run(each, seed)
        assert [peers.state.tolist()[1:] for peers in self.peers] == [[0, 0, 0]] * len(self.peers)
        return len(made)


ALGORITHMS = ("TWO_STEP", "ONE_STEP", "LOW_LATENCY", "REDUCE_SCATTER", "ALL_GATHER", "ALL_TO_ALL")


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    """Blocks of two warps, so that fibers are few."""
    monkeypatch.setattr(collective, "_THREADS", 64)


def macros(algorithm, spec, ranks, dtype=torch.bfloat16):
    first, second = (collective.cuda.spell(single) for single in codecs.parse(spec).formats)
    kinds = algorithm, collective.cuda.VALUES[dtype], first, second, ranks
    return ("COLLECTIVE", ", ".join(map(str, kinds))), ("THREADS", "64")


_made = {}


def kernels_of(*kinds):
    """Compiled once for all tests of this file."""
    if kinds not in _made:
        _made[kinds] = cuda_on_cpu.Collectives(macros(*kind) for kind in kinds)
    return _made[kinds]


INT8 = tuple((algorithm, "int8g128", 3) for algorithm in ALGORITHMS)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 128), (17, 640)])
def test_sums_have_the_bits_of_the_simulation(shape, monkeypatch):
    world, codec = World(3), codecs.parse("int8g128")
    xs = [promises.tensor(rank, shape) for rank in range(3)]
    for seed in (0, 7):
        for name, small in (("two_step", 0), ("one_step", 0), ("one_step", 1 << 16)):
            monkeypatch.setattr(collective, "LOW_LATENCY_BYTES", small)
            outs = [torch.full_like(x, 7.0) for x in xs]
            world.run(kernels_of(*INT8), name, codec, xs, outs, seed=seed)
            want = flashcomm.simulate.all_reduce(xs, codec, name)
            assert all(promises.same(out, want) for out in outs), (name, small, seed)


@needs_compiler
@pytest.mark.parametrize(
    ("spec", "ranks", "dtype"),
    [("int4g32", 2, torch.float16), ("mxfp4+hadamard", 2, torch.float32), ("int4g128:fp8g128", 8, torch.bfloat16)],
)
def test_other_formats_types_and_numbers_of_ranks(spec, ranks, dtype):
    world, codec = World(ranks, half_bytes=1 << 18, processors=2), codecs.parse(spec)
    xs = [promises.tensor(rank, (9, 512), dtype) for rank in range(ranks)]
    world.run(kernels_of(("TWO_STEP", spec, ranks, dtype)), "two_step", codec, xs, xs)
    want = flashcomm.simulate.all_reduce([promises.tensor(r, (9, 512), dtype) for r in range(ranks)], codec, "two_step")
    assert all(promises.same(x, want) for x in xs)


@needs_compiler
def test_halves_and_messages_that_need_several_launches():
    world, codec = World(3, half_bytes=14_000, processors=2), codecs.parse("int8g128")
    xs = [promises.tensor(rank, (12, 1280)) for rank in range(3)]
    payloads = torch.stack([codec.encode(x) for x in xs])
    sums = codecs.decode_sum(payloads, codec, 1280, xs[0].dtype)
    decoded = torch.cat([codec.decode(payload, 1280, xs[0].dtype) for payload in payloads])
    outs = [torch.empty(4, 1280, dtype=xs[0].dtype) for _ in xs]
    assert world.run(kernels_of(*INT8), "reduce_scatter", codec, xs, outs, seed=3) > 1
    assert promises.same(torch.cat(outs), sums)
    outs = [torch.empty_like(decoded) for _ in xs]
    assert world.run(kernels_of(*INT8), "all_gather", codec, xs, outs, seed=3) > 1
    assert all(promises.same(out, decoded) for out in outs)
    outs = [torch.empty_like(x) for x in xs]
    assert world.run(kernels_of(*INT8), "two_step", codec, xs, outs) > 1
    assert all(promises.same(out, flashcomm.simulate.all_reduce(xs, codec, "two_step")) for out in outs)


@needs_compiler
@pytest.mark.parametrize("seed", [0, 5])
def test_rows_to_every_rank_in_turn(seed):
    """Of any number, none too, and more than the ring of tiles has room for."""
    world, codec = World(3, half_bytes=3 * 2 * 2 * 16 * 132 + 32, processors=2), codecs.parse("int8g128")
    rows = [[3, 0, 40], [1, 2, 0], [0, 9, 1]]
    xs = [promises.tensor(rank, (sum(sent), 512)) for rank, sent in enumerate(rows)]
    splits = [(sent, [theirs[rank] for theirs in rows]) for rank, sent in enumerate(rows)]
    outs = [torch.full((sum(received), 512), 7.0, dtype=torch.bfloat16) for _, received in splits]
    for _ in range(2):
        world.run(kernels_of(*INT8), "all_to_all", codec, xs, outs, seed=seed, splits=splits)
    for rank, out in enumerate(outs):
        parts = [x.split(sent)[rank] for x, sent in zip(xs, rows, strict=True)]
        assert promises.same(out, codec.decode(codec.encode(torch.cat(parts)), 512, out.dtype))


@needs_compiler
def test_launches_of_all_kinds_follow_each_other(monkeypatch):
    """With any number of blocks; nothing that an earlier one left is taken for new."""
    world, codec = World(2, processors=4), codecs.parse("int8g128")
    kernels = kernels_of(*((algorithm, "int8g128", 2) for algorithm in ALGORITHMS))
    for call in range(12):
        xs = [promises.tensor(rank, (1 + call * 5 % 9, 640), seed=call) for rank in range(2)]
        outs = [torch.empty_like(x) for x in xs]
        name = ("two_step", "one_step", "one_step")[call % 3]
        monkeypatch.setattr(collective, "LOW_LATENCY_BYTES", 1 << 16 if call % 3 == 2 else 0)
        world.run(kernels, name, codec, xs, outs, seed=call)
        want = flashcomm.simulate.all_reduce(xs, codec, name)
        assert all(promises.same(out, want) for out in outs), call
    assert {int(peers.state[0]) for peers in world.peers} == {12}


@needs_compiler
def test_a_rank_that_stays_away(monkeypatch):
    """The launch ends, the host is told which rank did not come, and later launches wait for nobody."""
    kernels, codec = kernels_of(*INT8), codecs.parse("int8g128")
    for small in (0, 1 << 16):
        monkeypatch.setattr(collective, "LOW_LATENCY_BYTES", small)
        world = World(3, patience=200)
        xs = [promises.tensor(rank, (2, 256)) for rank in range(3)]
        outs = [torch.empty_like(x) for x in xs]
        # Rank 2 never comes: it launches in a second world, whose memory nobody else sees.
        elsewhere = World(3, patience=1)
        for each in world.launches("one_step", codec, xs, outs):
            each[2] = elsewhere.launches("one_step", codec, xs, outs)[0][2]
            kernels.run(each)
        assert [int(peers.lost[0]) for peers in world.peers[:2]] == [3, 3]
        with pytest.raises(RuntimeError, match="rank 2 did not come while rank 0 waited"):
            collective.check(world.peers[0])
        world.peers[0].lost.zero_()
        for each in world.launches("one_step", codec, xs, outs):
            # As a replay, with a patience of minutes.
            each[0].argument.patience = 1 << 30
            each[1].argument.patience = 1 << 30
            each[2] = elsewhere.launches("one_step", codec, xs, outs)[0][2]
            kernels.run(each)


@needs_compiler
def test_launches_that_run_at_the_same_time_are_noticed():
    world, codec = World(3), codecs.parse("int8g128")
    xs = [promises.tensor(rank, (2, 256)) for rank in range(3)]
    outs = [torch.empty_like(x) for x in xs]
    world.peers[1].state[2] = 1
    for each in world.launches("two_step", codec, xs, outs):
        kernels_of(*INT8).run(each)
    assert [int(peers.lost[0]) for peers in world.peers] == [0, -1, 0]


def test_blocks_follow_the_size_of_a_message(monkeypatch):
    monkeypatch.setattr(collective, "_THREADS", 256)
    peers = dataclasses.replace(World(4).peers[0], processors=132, size_bytes=64 << 20)

    def blocks(kib, name="two_step"):
        x = torch.empty(kib * 512 // 4096, 4096, dtype=torch.bfloat16)
        (launch,) = collective.launches(name, codecs.parse("int4g128"), x, x, peers)
        return launch.blocks, launch.threads

    assert [blocks(kib) for kib in (64, 1024, 16384)] == [(1, 256), (16, 256), (132, 256)]
    assert blocks(64, "one_step") == (16, 64)


def test_bytes_that_a_rank_sends():
    x, codec = torch.empty(8, 512, dtype=torch.bfloat16), codecs.parse("int8g128")
    sent = {name: collective.sent_bytes(name, codec, x, 4, 5) for name in ("two_step", "reduce_scatter", "all_gather")}
    assert sent == {"two_step": 3 * 4 * 528, "reduce_scatter": 3 * 2 * 528, "all_gather": 3 * 8 * 528}
    assert collective.sent_bytes("all_to_all", codec, x, 4, 5) == 5 * 528
    # Lines are half flags.
    assert collective.sent_bytes("one_step", codec, x, 4, 5) == 2 * 3 * 8 * 528


@pytest.mark.parametrize(
    ("name", "spec", "cols", "ranks", "why"),
    [
        ("two_step", "int8g128", 2880, 4, "rows of whole packs of 128 values, not of 2880"),
        ("two_step", "nvfp4", 4096, 4, "no CUDA C++ kernel for nvfp4"),
        ("two_step", "int8g128", 4096, 9, "up to 8 ranks, not 9"),
        ("broadcast", "int8g128", 4096, 4, "no launch for broadcast"),
    ],
)
def test_what_it_does_not_serve_is_said(name, spec, cols, ranks, why):
    assert why in collective.why_not(name, codecs.parse(spec), cols, ranks)
    assert collective.why_not("two_step", codecs.parse("int8g128"), 4096, 8) is None


def test_it_is_off_unless_switched_on(monkeypatch):
    monkeypatch.delenv("FLASHCOMM_CUDA", raising=False)
    task = Task(
        name="two_step", codec=codecs.parse("int8g128"), rows=4, cols=512, dtype=torch.bfloat16,
        out_dtype=torch.bfloat16, device=torch.device("cuda"),
    )  # fmt: skip
    assert collective.prepare(task, World(2).peers[0]) is None
    monkeypatch.setattr(collective.cuda, "why_not", lambda codec: None)
    assert collective.prepare(task, World(2).peers[0]) is not None
    uneven = dataclasses.replace(task, name="all_gather", sizes=(4, 0))
    assert collective.prepare(uneven, World(2).peers[0]) is None


TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@pytest.mark.skipif(compiler.find() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc")
@pytest.mark.parametrize(
    ("algorithm", "spec", "ranks", "target"),
    [
        *(("TWO_STEP", "int8g128", 8, target) for target in TARGETS),
        *((name, "int8g128", 4, "sm_90") for name in ALGORITHMS if name != "TWO_STEP"),
        *(
            thorough("TWO_STEP", spec, ranks, target)
            for spec, ranks in itertools.product(("int8g128", "int4g32", "int4g128+hadamard", "fp8g128"), (2, 4, 8))
            for target in TARGETS
            if (spec, ranks) != ("int8g128", 8)
        ),
    ],
)
def test_machine_code_for_six_gpus(algorithm, spec, ranks, target, tmp_path, monkeypatch):
    """No register is spilled, and a multiprocessor has room for a block."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = "64" if algorithm == "LOW_LATENCY" else "256"
    kinds = {**dict(macros(algorithm, spec, ranks)), "THREADS": threads}
    code = sass.read(compiler.cubin(kinds, target, collective.SOURCE))
    assert code.registers <= 168
    assert code.spilled_bytes == 0
