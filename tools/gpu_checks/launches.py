"""All-reduces in one launch, of ranks that are streams of one process.

Their kernels run at the same time, which those of processes that share a GPU do not: these take turns of some
milliseconds.
"""

import multiprocessing
import random
import statistics
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import torch

from flashcomm import codecs, kernels
from flashcomm.codecs import Codec
from flashcomm.transports.base import Task
from gpu_checks.kernels import SCRIPT
from gpu_checks.measuring import DEVICE, DRY, device_ms, differing, note, summed, synchronize, values

CASES = (("int8g128", 4096), ("int4g128", 4096), ("int8g128", 2880), ("nvfp4", 4096), ("int4g128:int8g128", 5120))
_COMPILERS = 12
_TIMED_KIB = (16, 64, 1024, 4096, 16384, 65536)


class World:
    """R ranks as R streams; without a GPU, one rank."""

    def __init__(self, ranks: int, programs: int, size_bytes: int = 256 << 20, patience: int = 20_000_000):
        from flashcomm.transports.symmetric import launch

        self.launch = launch
        self.streams = [None if DRY else torch.cuda.Stream() for _ in range(ranks)]
        self._memory = [torch.zeros(size_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(ranks)]
        table = torch.tensor([part.data_ptr() for part in self._memory], dtype=torch.int64, device=DEVICE)
        self.peers = [
            launch.Peers(
                rank=rank,
                buffers=table,
                size_bytes=size_bytes,
                epochs=torch.zeros(2, programs, dtype=torch.int32, device=DEVICE),
                lost=torch.zeros(1, dtype=torch.int32, pin_memory=not DRY),
                patience=patience,
            )
            for rank in range(ranks)
        ]
        synchronize()

    def sum(self, xs: list[torch.Tensor], codec: Codec, outs: list[torch.Tensor], algorithm: str):
        """All-reduce on every rank, each on its stream; the current stream waits for all."""
        here = None if DRY else torch.cuda.current_stream()
        for stream, peers, x, out in zip(self.streams, self.peers, xs, outs, strict=True):
            if stream:
                stream.wait_stream(here)
            with torch.cuda.stream(stream) if stream else nullcontext():
                self.launch.all_reduce(x, codec, peers, out, algorithm)
        for stream in self.streams:
            if stream:
                here.wait_stream(stream)

    def warm(self, xs: list[torch.Tensor], codec: Codec, outs: list[torch.Tensor], algorithm: str):
        """Load a kernel before several of it wait for each other: loading may wait for the device."""
        for _ in range(2):
            self.sum(xs, codec, outs, algorithm)
            synchronize()

    def record(self, xs: list[torch.Tensor], codec: Codec, outs: list[torch.Tensor], algorithm: str, calls: int = 1):
        """Capture a graph of `calls` all-reduces for each rank."""
        graphs = []
        for stream, peers, x, out in zip(self.streams, self.peers, xs, outs, strict=True):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(calls):
                    self.launch.all_reduce(x, codec, peers, out, algorithm)
            graphs.append(graph)
        synchronize()
        return graphs

    def lost(self) -> list[int]:
        """One more than the rank that did not come, for each rank; 0 where all came."""
        return [int(peers.lost[0]) for peers in self.peers]


class HotWorld:
    """R ranks as R streams, for the collectives in CUDA C++; without a GPU, fibers on the CPU.

    Args:
        ranks: their number.
        size_bytes: memory of each.
    """

    def __init__(self, ranks: int, size_bytes: int = 256 << 20):
        from flashcomm.transports.symmetric import collective

        self.collective = collective
        if DRY:
            collective._THREADS = 64
        self.streams = [None if DRY else torch.cuda.Stream() for _ in range(ranks)]
        self.memory = torch.zeros(ranks, size_bytes, dtype=torch.uint8, device=DEVICE)
        processors = 2 if DRY else torch.cuda.get_device_properties(0).multi_processor_count
        table = torch.tensor([part.data_ptr() for part in self.memory], dtype=torch.int64, device=DEVICE)
        self.peers = [
            collective.Peers(
                rank=rank,
                memory=table,
                size_bytes=size_bytes,
                state=torch.zeros(4, dtype=torch.int64, device=DEVICE),
                lost=torch.zeros(1, dtype=torch.int32, pin_memory=not DRY),
                # All ranks are on this GPU, and their blocks must find room at the same time.
                processors=max(1, processors // ranks),
                patience=20_000_000,
            )
            for rank in range(ranks)
        ]
        synchronize()

    def run(self, name: str, codec: Codec, xs: list, outs: list, splits: list | None = None):
        """Run a collective on every rank, each on its stream; the current stream waits for all."""
        made = [
            [*self.collective.launches(name, codec, x, out, peers, splits[peers.rank] if splits else None)]
            for x, out, peers in zip(xs, outs, self.peers, strict=True)
        ]
        for each in map(list, zip(*made, strict=True)):
            self._start(each)

    def _start(self, each: list):
        if DRY:
            import cuda_on_cpu

            cuda_on_cpu.Collectives([each[0].macros]).run(each)
            return
        from flashcomm.kernels.gpu.cuda import driver

        here = torch.cuda.current_stream()
        driver.make_current(0)
        # Loaded before several of it wait for each other: loading may wait for the device.
        kernel = driver.kernel(each[0].macros, 0, "collective", self.collective.SOURCE)
        for launch, stream in zip(each, self.streams, strict=True):
            stream.wait_stream(here)
            kernel(launch.blocks, stream.cuda_stream, launch.argument, launch.threads)
        for stream in self.streams:
            here.wait_stream(stream)

    def wrong(self, name: str, codec: Codec, rows: int, cols: int) -> list[str]:
        """Mistakes of a collective on bf16 rows, compared with the specification."""
        ranks = len(self.peers)
        inputs, dtype = [values(rank, rows, cols) for rank in range(ranks)], torch.bfloat16
        payloads = torch.stack([codec.encode(x) for x in inputs])
        decoded = [codec.decode(payload, cols, dtype) for payload in payloads]
        splits, part = None, rows // ranks
        if name in ("one_step", "two_step"):
            want = [summed(inputs, codec, name)] * ranks
        elif name == "reduce_scatter":
            want = list(codecs.decode_sum(payloads, codec, cols, dtype).split(part))
        elif name == "all_gather":
            want = [torch.cat(decoded)] * ranks
        else:
            splits = [([part] * ranks, [part] * ranks)] * ranks
            want = [torch.cat([one.split(part)[rank] for one in decoded]) for rank in range(ranks)]
        xs = [x.to(DEVICE) for x in inputs]
        outs = [torch.full(one.shape, 7.0, dtype=dtype, device=DEVICE) for one in want]
        self.run(name, codec, xs, outs, splits)
        synchronize()
        bad = [differing(out, one) for out, one in zip(outs, want, strict=True)]
        lost = [int(peers.lost[0]) for peers in self.peers]
        return [
            f"R={ranks} {name} {codec} [{rows}, {cols}] rank {r}: {n} bytes, {lost}" for r, n in enumerate(bad) if n
        ]


def collectives():
    """Compare the collectives in CUDA C++ with the specification over 2, 4 and 8 ranks; note their times by size."""
    wrong: list[str] = []
    table: dict[str, float] = {}
    verbs = ("two_step", "one_step", "reduce_scatter", "all_gather", "all_to_all")
    for ranks in (2,) if DRY else (2, 4, 8):
        world = HotWorld(ranks, 5 << 20 if DRY else 256 << 20)
        for spec in ("int8g128",) if DRY else ("int8g128", "int4g128", "mxfp4+hadamard"):
            for name in verbs[:2] if DRY else verbs:
                # Lines, and a message of several tiles for every block.
                for rows, cols in ((ranks, 256),) if DRY else ((ranks, 4096), (64 * ranks, 5120)):
                    wrong += world.wrong(name, codecs.parse(spec), rows, cols)
            note(wrong=wrong)
            for kib in () if DRY else _TIMED_KIB[:5]:
                xs = [torch.randn(max(1, kib * 512 // 4096), 4096, device=DEVICE).bfloat16() for _ in range(ranks)]
                for name in verbs[:2]:
                    where = f"R={ranks} {spec} {name} {kib} KiB"
                    call = partial(world.run, name, codecs.parse(spec), xs, xs)
                    table[where] = round(1e3 * device_ms(call, 5), 1)
            note(us=table)
    note(wrong=wrong)
    print(*wrong[:12] or ["all bits are those of the specification"], *table.items(), sep="\n")


def _algorithms(spec: str) -> tuple[str, ...]:
    return ("two_step",) if ":" in spec else ("two_step", "one_step")


def fused():
    """Compare bits with 2, 4 and 8 ranks, and note times over sizes and programs."""
    worlds = (1,) if DRY else (2, 4, 8)
    if not DRY:
        jobs = [(*case, ranks) for ranks in worlds for case in CASES]
        with multiprocessing.get_context("spawn").Pool(_COMPILERS) as pool:
            pool.map(_compile, jobs, chunksize=1)
    table: dict[str, float] = {}
    wrong: list[str] = []
    for ranks in worlds:
        # More programs only of kernels of which all find room on the device at once.
        for programs in (2,) if DRY else (16, 64) if ranks < 8 else (16, 48):
            world = World(ranks, programs, 1 << 22 if DRY else 256 << 20)
            for spec, cols in CASES[: 1 if DRY else len(CASES) if programs == 16 else 2]:
                for algorithm in _algorithms(spec):
                    where = f"R={ranks} B={programs} {spec} {cols} {algorithm}"
                    wrong += _wrong_sums(world, where, codecs.parse(spec), cols, algorithm)
                    if cols == 4096 and ":" not in spec and spec != "nvfp4" and not DRY:
                        table |= _times(world, where, codecs.parse(spec), cols, algorithm)
                    note(us=table, wrong=wrong)
            if any(world.lost()):
                wrong.append(f"R={ranks} B={programs}: lost {world.lost()}")
    note(wrong=wrong)
    print(*wrong[:12] or ["all bits are those of the specification"], sep="\n")
    for name, us in table.items():
        print(f"{name:48s} {us:9.1f} us")


def _compile(job: tuple[str, int, int]):
    """Put the kernels of a codec into Triton's cache on disk, in a worker, without a launch."""
    from flashcomm.transports.symmetric import launch

    spec, cols, ranks = job
    peers = launch.Peers(
        rank=0,
        buffers=torch.zeros(ranks, dtype=torch.int64, device=DEVICE),
        size_bytes=1 << 24,
        epochs=torch.zeros(2, 16, dtype=torch.int32, device=DEVICE),
        lost=torch.zeros(1, dtype=torch.int32, pin_memory=True),
    )
    task = Task(
        name="two_step", codec=codecs.parse(spec), rows=33, cols=cols, dtype=torch.bfloat16, out_dtype=torch.bfloat16,
        device=torch.device(DEVICE),
    )  # fmt: skip
    launch.load(task, peers)


def _wrong_sums(world: World, where: str, codec: Codec, cols: int, algorithm: str) -> list[str]:
    inputs = [values(rank, 1 if DRY else 33, cols) for rank in range(len(world.peers))]
    xs = [x.to(DEVICE) for x in inputs]
    outs = [torch.full_like(x, 7.0) for x in xs]
    world.warm(xs, codec, outs, algorithm)
    want = summed(inputs, codec, algorithm)
    bad = [differing(out, want) for out in outs]
    return [f"{where} rank {rank}: {count} bytes, lost {world.lost()}" for rank, count in enumerate(bad) if count]


def _times(world: World, where: str, codec: Codec, cols: int, algorithm: str) -> dict[str, float]:
    """Microseconds by size, by one graph for each rank, replayed side by side as on as many GPUs."""
    ranks, table = len(world.peers), {}
    for kib in _TIMED_KIB[: 5 if ranks == 8 else 6]:
        xs = [torch.randn(max(1, kib * 512 // cols), cols, device=DEVICE).bfloat16() for _ in range(ranks)]
        outs = [torch.empty_like(x) for x in xs]
        world.warm(xs, codec, outs, algorithm)
        graphs, times = world.record(xs, codec, outs, algorithm, 5), []
        for _ in range(7):
            synchronize()
            begin, ends = torch.cuda.Event(enable_timing=True), []
            begin.record()
            for stream, graph in zip(world.streams, graphs, strict=True):
                stream.wait_event(begin)
                with torch.cuda.stream(stream):
                    graph.replay()
                    ends.append(torch.cuda.Event(enable_timing=True))
                    ends[-1].record()
            synchronize()
            times.append(max(begin.elapsed_time(end) for end in ends) / 5)
        table[f"{where} {kib} KiB"] = round(statistics.median(times) * 1e3, 1)
    return table


def graphs(ranks: int = 4, replays: int = 2000):
    """Replay graphs with new inputs, each rank at its own pace; compare on the device."""
    world, codec, sets = World(ranks, 16), codecs.parse("int4g128"), 8
    inputs = [[values(rank, 16, 4096, seed=n) for rank in range(ranks)] for n in range(sets)]
    want = [summed(xs, codec, "two_step").to(DEVICE).view(torch.int16) for xs in inputs]
    held = [[x.to(DEVICE) for x in xs] for xs in inputs]
    xs = [torch.zeros(16, 4096, dtype=torch.bfloat16, device=DEVICE) for _ in range(ranks)]
    outs = [torch.empty_like(x) for x in xs]
    bad = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(ranks)]
    world.warm(xs, codec, outs, "two_step")
    recorded, pace = world.record(xs, codec, outs, "two_step"), random.Random(0)
    for n in range(replays):
        for rank, stream in enumerate(world.streams):
            with torch.cuda.stream(stream):
                if pace.random() < 0.2:
                    torch.cuda._sleep(pace.randrange(200_000))
                xs[rank].copy_(held[n % sets][rank])
                recorded[rank].replay()
                bad[rank] += (outs[rank].view(torch.int16) != want[n % sets]).any()
        if n % 100 == 99:
            synchronize()
    wrong = [f"rank {rank}: {int(count)} replays" for rank, count in enumerate(bad) if count]
    note(replays=replays, wrong=wrong, lost=world.lost())
    print(replays, "replays", wrong, world.lost())


def few_launches():
    """Encode, decode, and sum over two ranks once, for `sanitizer`."""
    for spec in ("int8g128", "int3g32", "mxfp4", "int2g32+spike"):
        x = torch.randn(3, 333, device=DEVICE).bfloat16()
        payload = kernels.encode(x, spec)
        kernels.decode(payload, spec, cols=333, dtype=x.dtype)
        kernels.decode_sum_encode(torch.stack([payload, payload]), spec, spec, cols=333)
    synchronize()
    # Under a sanitizer launches may run one after the other; then `lost` says so.
    world = World(2, 4, 1 << 22, 2_000_000)
    xs = [torch.randn(5, 512, device=DEVICE).bfloat16() for _ in range(2)]
    for algorithm in _algorithms("int8g128"):
        world.sum(xs, codecs.parse("int8g128"), [torch.empty_like(x) for x in xs], algorithm)
        synchronize()
    print("lost", world.lost())


def sanitizer():
    """Run `few_launches` under compute-sanitizer."""
    wrong = []
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "5", "--error-exitcode", "9"]
        command += [sys.executable, SCRIPT, "--one", "few_launches", "."]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=75)
            text = done.stdout + done.stderr
            if done.returncode == 9:
                wrong.append(f"{tool} found errors")
        except subprocess.TimeoutExpired as error:
            text = f"not within {error.timeout} s"
        lines = [line for line in text.splitlines() if "SUMMARY" in line or "Invalid" in line or "lost" in line]
        note(**{tool: lines[-4:] or [text[-300:]]}, wrong=wrong)
        print(tool, *lines[-4:] or [text[-300:]], sep="\n")
