"""The protocol of `exchange.cu`, checked on its own source in every execution of a small world.

The kernels run on the CPU once, and note which memory of the ranks they touch and what puts that in order: flags,
lines, fences, barriers. What a thread does depends on no other, so these are its operations in every execution, and
`interleavings` explores all of them. Without a race there is one result, which test_collective.py compares with the
specification. Actors are blocks, and warps where barriers are checked; a launch begins when all of the rank's launch
before has ended. Each planted fault replaces a line of the source, and must be found.

Memory that is always touched together counts as one word. Lines order nothing but themselves within a launch, and none
is written twice in one, so it does no harm that they count as flags here.
"""

from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")
from test_collective import BEFORE, World, macros

import cuda_on_cpu
import interleavings
from flashcomm import codecs
from flashcomm.transports.symmetric import collective
from interleavings import Deliver, Publish, Read, Wait, Write

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")

READ, WRITE, SET, WAITED, TOOK, FENCE, BARRIER = range(7)
ENDED, MET, LINE = 1 << 60, 1 << 61, 1 << 62
"""Counters of launches that have ended, of barriers and of lines."""
CODEC, MOST_WARPS = codecs.parse("int8g128"), 2


def traced(kernels, calls, world, version):
    """Events of each launch, the number of blocks of a rank, and that of warps of a block."""
    world.memory.zero_()
    for peers in world.peers:
        peers.state.zero_(), peers.lost.zero_()
    for name, packs, splits in calls:
        sizes = [sum(sent) for sent, _ in splits] if splits else [packs] * len(world.peers)
        xs = [torch.ones(max(1, size), 128) for size in sizes]
        outs = [torch.empty(64, 128) for _ in xs]
        for each in world.launches(name, CODEC, xs, outs, splits):
            yield kernels.run(each, memory=world.memory, version=version), each[0].blocks, each[0].threads // 32


def operations(launches, blocks: int, bytes_of_a_rank: int, warps_apart: bool) -> list[list]:
    """The operations of every block, or of every warp, that any launch has, one launch after the other."""
    of_rank, found = blocks * MOST_WARPS, []
    for events, its_blocks, warps in launches:
        phases, met = defaultdict(lambda: defaultdict(list)), defaultdict(int)
        for kind, thread, address, value in events:
            rest, warp = divmod(thread // 32, warps)
            rank, block = divmod(rest, its_blocks)
            warp = warp if warps_apart else 0
            actor = rank * of_rank + block * MOST_WARPS + warp
            phases[actor][met[thread]].append((kind, thread, address, value))
            met[thread] += kind == BARRIER
        found.append((phases, warps))
    made: dict[int, list] = {actor: [] for actor in sorted({actor for phases, _ in found for actor in phases})}
    touched: dict[object, set] = defaultdict(set)
    for place, (phases, warps) in enumerate(found):
        for actor, here in made.items():
            if place:
                here += [Wait(ENDED + other, place, True) for other in made if other // of_rank == actor // of_rank]
            for phase in sorted(phases[actor]):
                _phase(here, phases[actor][phase], touched, actor, bytes_of_a_rank)
                if warps_apart and any(kind == BARRIER for kind, *_ in phases[actor][phase]):
                    number, first = (place << 20) + phase + 1, actor // MOST_WARPS * MOST_WARPS
                    here.append(Publish(MET + actor, number, True))
                    here += [Wait(MET + other, number, True) for other in range(first, first + warps) if other != actor]
            here.append(Publish(ENDED + actor, place + 1, True))
    return _with_words(made, touched)


def _phase(here, events, touched, actor, bytes_of_a_rank):
    """Add what a warp does between two barriers: flags, and in between what it touches."""
    segment: dict[tuple, int] = {}

    def flush():
        for kind, place in segment:
            touched[place].add((actor, len(here), kind))
        if segment:
            here.append(dict(segment))
            segment.clear()

    fences = defaultdict(list)
    for place, (kind, thread, *_) in enumerate(events):
        if kind == FENCE:
            fences[thread].append(place)
    for place, (kind, thread, address, value) in enumerate(events):
        inside = address % bytes_of_a_rank
        if kind in (FENCE, BARRIER):
            continue
        if kind in (READ, WRITE):
            assert inside >= BEFORE, "payloads among flags"
            segment |= {(kind, granule): 0 for granule in range(address >> 4, (address + value + 15) >> 4)}
            continue
        assert inside < BEFORE, "a flag among payloads"
        if inside >= collective._FLAGS_BYTES:
            if any(other != kind for other, _ in segment):
                flush()
            segment[kind, ("line", address)] = value >> 32 if kind == SET else value
            continue
        flush()
        if kind == SET:
            here.append(Publish(address, value, any(fence < place for fence in fences[thread])))
        else:
            here.append(Wait(address, value, any(fence > place for fence in fences[thread])))
    flush()


def _with_words(made, touched):
    """Make one word of the memory, and one line of the lines, that are always touched together."""
    words: dict[frozenset, int] = {}
    word_of = {place: words.setdefault(frozenset(how), len(words)) for place, how in touched.items()}
    actors = []
    for actor in sorted(made):
        steps = []
        for step in made[actor]:
            if not isinstance(step, dict):
                steps.append(step)
                continue
            for kind, word, value in sorted({(kind, word_of[place], value) for (kind, place), value in step.items()}):
                if kind == TOOK:
                    steps.append(Wait(LINE + word, value, True))
                steps.append(Read(word) if kind in (READ, TOOK) else Write(word, 0, "x"))
                if kind == SET:
                    steps.append(Publish(LINE + word, value, True))
            steps.append(Deliver(None))
        actors.append(steps)
    return actors


def wrong(kernels, ranks, blocks, calls, warps_apart, version=0, until=None):
    # A tile has 8 packs to a warp.
    world = World(ranks, half_bytes=1 << 16, processors=blocks, patience=2000)
    launches = list(traced(kernels, calls, world, version))
    actors = operations(launches, blocks, world.memory.shape[1], warps_apart)
    found = interleavings.explore(actors, until=until)
    assert until or found.states > 50
    return found.wrong


def two_step(packs):
    return "two_step", packs, None


def one_step(packs):
    return "one_step", packs, None


SPLITS = [([8, 24], [8, 16]), ([16, 0], [24, 0])]
ALL_TO_ALL = ("all_to_all", 0, SPLITS)
ONE_WAY = ("all_to_all", 0, [([0, 8], [0, 0]), ([0, 0], [8, 0])])
LONG_WAY = ("all_to_all", 0, [([0, 24], [0, 0]), ([0, 0], [24, 0])])

# (ranks, blocks, threads, LOW_LATENCY_BYTES, calls)
WORLDS = {
    "two_step": (2, 1, 32, 0, [two_step(16)] * 3),
    "two_step, several tiles": (2, 1, 32, 0, [two_step(40)]),
    "two_step, no row for one rank": (2, 1, 32, 0, [two_step(1)] * 3),
    "two_step, three ranks": (3, 1, 32, 0, [two_step(3)]),
    "one_step, two warps": (2, 1, 64, 0, [one_step(16)]),
    "one_step": (2, 1, 32, 0, [one_step(8)] * 4),
    "other numbers of blocks": (2, 2, 32, 0, [one_step(16), one_step(1)]),
    "halves": (2, 1, 32, 0, [("reduce_scatter", 16, None), ("all_gather", 8, None), ("reduce_scatter", 16, None)]),
    "lines": (2, 1, 32, 1 << 16, [one_step(16)] * 3),
    "lines among flags": (2, 1, 32, 1 << 14, [one_step(16), two_step(1), one_step(1)]),
    "all_to_all": (2, 1, 32, 0, [ALL_TO_ALL] * 2),
    "all_to_all, one way": (2, 1, 32, 0, [LONG_WAY] * 3),
}

MACROS = {
    (algorithm, threads, ranks): (macros(algorithm, "int8g128", ranks, torch.float32)[0], ("THREADS", str(threads)))
    for algorithm, threads, ranks in (
        *(("TWO_STEP", threads, ranks) for threads, ranks in ((32, 2), (32, 3))),
        *((name, 32, 2) for name in ("ONE_STEP", "REDUCE_SCATTER", "ALL_GATHER", "ALL_TO_ALL")),
        *((name, 64, 2) for name in ("ONE_STEP", "LOW_LATENCY")),
    )
}

# What is planted: (the line, what stands there instead, algorithm, threads, calls, one of what must be found).
SIGNAL = "barrier();\n    if (is_peer(thread()) && meant) fence(), set("
FAULTS = {
    "does not wait for payloads": ("launch.await(0, middle + 1);", "", "TWO_STEP", 32, [two_step(16)], "race"),
    "does not wait for sums": ("launch.await(1, last + 1);", "", "TWO_STEP", 32, [two_step(16)], "race"),
    "waits for a tile too few": (
        *("launch.await(0, middle + 1)", "launch.await(0, middle)", "TWO_STEP", 32, [two_step(40)], "race"),
    ),
    "says it before all warps have written": (
        *(SIGNAL, SIGNAL.replace("barrier();", ""), "ONE_STEP", 64, [one_step(16)], "race"),
    ),
    "sets flags without a fence": (SIGNAL, SIGNAL.replace("fence(), ", ""), "TWO_STEP", 32, [two_step(16)], "race"),
    "reads after a flag without a fence": (
        *("      fence();\n    }\n    barrier();", "    }\n    barrier();", "TWO_STEP", 32, [two_step(16)], "race"),
    ),
    "has one half": ("i64(epoch & 1) * e.half_bytes", "0", "ONE_STEP", 32, [one_step(8)] * 2, "race"),
    "has one flag for both steps": ("(step * MOST_RANKS + source)", "source", "TWO_STEP", 32, [two_step(16)], "race"),
    "has lines of one half": (
        *("i64(epoch & 1) * MOST_RANKS", "i64(0) * MOST_RANKS", "LOW_LATENCY", 64, [one_step(16)] * 2, "race"),
    ),
    "does not count": (
        *("e.state[1] = 0, e.state[0] = epoch;", "e.state[1] = 0;", "ONE_STEP", 32, [one_step(8)] * 2, "race"),
    ),
    "signals a tile late": (
        *("launch.signal(1, middle + 1)", "launch.signal(1, middle)", "TWO_STEP", 32, [two_step(16)], "deadlock"),
    ),
    "writes over what was not read": (
        *("if (wave >= e.ring) launch.await_one(1,", "if (false) launch.await_one(1,"),
        *("ALL_TO_ALL", 32, [LONG_WAY], "race"),
    ),
    "does not wait for a rank that sends nothing": (
        *("  launch.await_one(0, to_come, true);\n", "", "ALL_TO_ALL", 32, [ONE_WAY] * 3, "race"),
    ),
}


@pytest.fixture(scope="module")
def kernels():
    faults = [(line, instead, MACROS[name, threads, 2]) for line, instead, name, threads, *_ in FAULTS.values()]
    return cuda_on_cpu.Collectives(MACROS.values(), faults)


@pytest.fixture(autouse=True)
def small_rings(monkeypatch):
    """Of two tiles, so that they go round."""
    real = collective.launches

    def launches(*given):
        for launch in real(*given):
            launch.argument.ring = min(launch.argument.ring, 2)
            yield launch

    monkeypatch.setattr(collective, "launches", launches)


@pytest.mark.parametrize("name", WORLDS)
def test_no_race_and_no_deadlock_in_any_execution(name, kernels, monkeypatch):
    ranks, blocks, threads, small, calls = WORLDS[name]
    monkeypatch.setattr(collective, "_THREADS", threads)
    monkeypatch.setattr(collective, "LOW_LATENCY_BYTES", small)
    assert wrong(kernels, ranks, blocks, calls, threads == 64) == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, kernels, monkeypatch):
    _, _, name, threads, calls, kind = FAULTS[fault]
    monkeypatch.setattr(collective, "_THREADS", threads)
    monkeypatch.setattr(collective, "LOW_LATENCY_BYTES", 0 if name != "LOW_LATENCY" else 1 << 16)
    found = wrong(
        kernels,
        2,
        1,
        calls,
        name != "LOW_LATENCY" and threads == 64,
        version=1 + list(FAULTS).index(fault),
        until={kind},
    )
    assert kind in found, found
