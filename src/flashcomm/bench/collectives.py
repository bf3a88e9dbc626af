"""`flashcomm bench all_reduce` and the other verbs: compressed against plain over sizes, in the manner of nccl-tests.

A message of `send` leads from rank 1 to rank 0; plain is torch's own `send` and `recv`.

Every answer is checked before anything is timed. Variants take turns. Each rank times its own call after a barrier, and
the slowest rank's time counts. Leaving a barrier takes longer than a small message, so up to 64 KiB a time is the mean
of 20 calls in a row. From there to 1 MiB there are five times as many rounds, because single calls of that size vary.

Hazard: plain is the backend's own operation, called as codec ``none``. It leaves its input unchanged like all others,
so its all-reduce copies first.
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

import flashcomm
from flashcomm import codecs, settings, simulate
from flashcomm.bench.timing import interleaved
from flashcomm.codecs import Codec, Pair, Plain
from flashcomm.collectives.group import group_of
from flashcomm.lab import hosts as labs
from flashcomm.lab import launch
from flashcomm.units import bits_per_second

_BATCHED_BYTES, _BATCH = 64 << 10, 20
_SINGLE_BYTES, _MORE_ROUNDS = 1 << 20, 5
_ROW = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRow:
    """One variant at one size; the fields are the columns of `results/all_reduce_*.json` and its like."""

    op: str
    ranks: int
    ranks_per_host: int
    backend: str
    dtype: str
    link: str
    """The rate of each host's link in a lab; ``unlimited`` there, ``local`` on one machine, or ``network``."""
    message_bytes: int
    """Uncompressed bytes of a rank's input or output, whichever is larger."""
    codec: str
    algorithm: str
    chosen: str
    """The algorithm that ran."""
    sent: str | None
    """The format that travelled; uncompressed where that is faster."""
    repeats: int
    calls_per_time: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    speedup: float
    """Median of the plain operation over this variant's, from the same rounds."""
    algorithm_gbps: float
    """Gigabytes of the message per second, at the median."""
    wire_gbps: float | None
    """Gigabytes that one rank sends per second."""
    wire_bytes: int | None
    """Bytes that one rank sends to others, without headers; None where the library does not tell."""
    interface_bytes: int | None
    """Bytes that an interface sent, on the host that sent most; None outside a lab."""
    cpu_ms: float | None
    """CPU time of a rank, with all its threads and the kernel's work, mean over the ranks. Where this times ranks
    over cores comes near the median, the cores are the limit."""
    ceiling: str | None
    """Ceiling of `ceiling_share`: ``link`` (time of `interface_bytes` at the rate) or ``copy`` (of the message)."""
    ceiling_share: float | None
    """The ceiling's time over the median; above 1 where the link's token bucket holds the message."""
    sqnr_db: float | None
    """SQNR of the result against fp64; None if it is exact."""


def rounds_and_calls(message_bytes: int, repeats: int) -> tuple[int, int]:
    """(rounds, calls timed together in each round) for a message of this size."""
    if message_bytes <= _BATCHED_BYTES:
        return repeats, _BATCH
    return repeats * (_MORE_ROUNDS if message_bytes <= _SINGLE_BYTES else 1), 1


def part_shape(op: str, size: int, ranks: int, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, cols) of the part of a message that one rank gives or gets; of an all-reduce the whole message."""
    values = max(1, size // dtype.itemsize // _parts(op, ranks))
    cols = min(values, _ROW)
    return values // cols, cols


def message_bytes(op: str, size: int, ranks: int, dtype: torch.dtype) -> int:
    """Bytes that are measured for a size of `size`: whole rows on each rank, at least one value.

    >>> message_bytes("all_gather", 100, 3, torch.bfloat16)
    96
    """
    rows, cols = part_shape(op, size, ranks, dtype)
    return rows * cols * dtype.itemsize * _parts(op, ranks)


def _parts(op: str, ranks: int) -> int:
    """Parts of a message, one from or for each rank."""
    return 1 if op in ("all_reduce", "send") else ranks


def run(
    op: str,
    specs: Sequence[str],
    *,
    ranks: int,
    sizes: Sequence[int],
    algorithms: Sequence[str] = ("auto",),
    repeats: int = 15,
    dtype: torch.dtype = torch.bfloat16,
    lab: labs.Lab | None = None,
) -> list[CollectiveRow]:
    """Measure one operation on ranks of this machine, on rows of 4,096 values, or on one shorter row.

    Args:
        op: ``all_reduce``, ``reduce_scatter``, ``all_gather``, ``all_to_all``, or ``send`` between two ranks.
        specs: codecs; ``none`` is always measured too.
        ranks: world size.
        sizes: message sizes in bytes; rounded down to whole rows for each rank, up to one value.
        algorithms: ``auto``, ``one_step``; for all_reduce all of `flashcomm.planner.ALGORITHMS`. Combinations that the
            operation or a codec refuses are left out.
        repeats: timed rounds.
        dtype: values' type in the message.
        lab: hosts for the ranks; None for this machine without a slow link.

    Raises:
        flashcomm.lab.launch.RankError: a rank failed, or a result is wrong or differs between ranks.
    """
    arguments = (op, tuple(specs), tuple(sizes), tuple(algorithms), repeats, dtype)
    return launch.run(measure, arguments, ranks=ranks, lab=lab)[0]


def measure(
    op: str, specs: Sequence[str], sizes: Sequence[int], algorithms: Sequence[str], repeats: int, dtype: torch.dtype
) -> list[CollectiveRow]:
    """Measure on every rank of the default process group; other arguments as for `run`. Rank 0 has the full rows.

    Raises:
        RuntimeError: a result is wrong.
    """
    return [row for size in sizes for row in _measure_size(op, specs, size, algorithms, repeats, dtype)]


def _measure_size(
    op: str, specs: Sequence[str], size: int, algorithms: Sequence[str], repeats: int, dtype: torch.dtype
) -> list[CollectiveRow]:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    case = Case(op, size, ranks, rank, dtype)
    x, out = case.x.to(device), torch.empty(case.exact.shape, dtype=dtype, device=device)
    rounds, calls = rounds_and_calls(case.message_bytes, repeats)
    variants, facts = {}, {}
    for spec, algorithm in _pairs(op, specs, algorithms):
        codec = codecs.parse(spec)
        call = _caller(op, x, codec, algorithm, out)
        flashcomm.reset_stats()
        call()
        stats = flashcomm.stats()
        done = stats["records"]
        # torch's own send is in nobody's counts.
        chosen, sent = (done[0].algorithm, done[0].codec) if done else ("plain", "none")
        wire_bytes = stats["wire_bytes"] if done else case.message_bytes
        if op == "send":
            wire_bytes = int(slowest([wire_bytes], device)[0])
        sqnr = case.check(out.cpu(), codecs.parse(sent), chosen)
        name = f"{codec}/{algorithm}"
        variants[name] = _repeated(call, calls)
        interface_bytes, cpu_ms = usage(variants[name], calls, device)
        facts[name] = {
            "codec": str(codec),
            "algorithm": algorithm,
            "chosen": chosen,
            "sent": sent,
            "wire_bytes": wire_bytes,
            "interface_bytes": interface_bytes,
            "cpu_ms": cpu_ms,
            "sqnr_db": sqnr,
        }
    message = torch.zeros(case.message_bytes, dtype=torch.uint8, device=device)
    copied = torch.empty_like(message)
    times = interleaved(
        {**variants, "copy": _repeated(lambda: copied.copy_(message), calls)},
        repeats=rounds,
        before=dist.barrier,
        after=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
        combine=lambda seconds: [s / calls for s in slowest(seconds, device)],
    )
    rate = _lab_rate()
    shared = {
        "op": op,
        "ranks": ranks,
        "ranks_per_host": int(os.environ.get("LOCAL_WORLD_SIZE") or ranks),
        "backend": dist.get_backend(),
        "dtype": str(dtype).removeprefix("torch."),
        "link": link_name(ranks),
        "message_bytes": case.message_bytes,
        "repeats": rounds,
        "calls_per_time": calls,
    }
    rows = []
    for name, own in facts.items():
        took = times[name]
        if rate and own["interface_bytes"]:
            ceiling, ceiling_ms = "link", 8e3 * own["interface_bytes"] / bits_per_second(rate)
        else:
            ceiling, ceiling_ms = "copy", times["copy"].p50_ms
        rows.append(
            CollectiveRow(
                **shared,
                **own,
                p20_ms=took.p20_ms,
                p50_ms=took.p50_ms,
                p80_ms=took.p80_ms,
                speedup=times["none/plain"].p50_ms / took.p50_ms,
                algorithm_gbps=case.message_bytes / took.p50_ms / 1e6,
                wire_gbps=own["wire_bytes"] / took.p50_ms / 1e6,
                ceiling=ceiling,
                ceiling_share=ceiling_ms / took.p50_ms,
            )
        )
    return rows


def _pairs(op: str, specs: Sequence[str], algorithms: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [("none", "plain")]
    for spec in specs:
        for algorithm in algorithms:
            one_format = op in ("all_to_all", "send") or (op == "all_reduce" and algorithm == "one_step")
            if spec != "none" and not (one_format and isinstance(codecs.parse(spec), Pair)):
                pairs.append((spec, algorithm))
    return pairs


def _caller(op: str, x: torch.Tensor, codec: Codec, algorithm: str, out: torch.Tensor) -> Callable[[], object]:
    if op != "send":
        return lambda: getattr(flashcomm, op)(x, codec, algorithm=algorithm, out=out)
    plain = isinstance(codec, Plain)
    if dist.get_rank() == 0:
        return lambda: dist.recv(out, src=1) if plain else flashcomm.recv(out, src=1, codec=codec)
    return lambda: dist.send(x, dst=0) if plain else flashcomm.send(x, dst=0, codec=codec)


def _repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    def repeated():
        for _ in range(times):
            call()

    return call if times == 1 else repeated


def slowest(values: Sequence[float], device: "torch.device | str" = "cpu") -> list[float]:
    """Each value's maximum over the ranks of the default group, which serves tensors on `device`."""
    longest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.tolist()


def usage(variant: Callable[[], object], calls: int, device: torch.device) -> tuple[int | None, float]:
    """(bytes on the interface, milliseconds of CPU time) of one call."""
    in_lab, times = settings.given(labs.RATE_VARIABLE), 3
    dist.barrier()
    before, start = labs.interface_bytes() if in_lab else 0, time.process_time()
    for _ in range(times):
        variant()
    spent = torch.tensor([time.process_time() - start], dtype=torch.float32, device=device)
    # Bytes have surely passed the interface once all ranks have received them.
    dist.barrier()
    sent = int(slowest([(labs.interface_bytes() - before) / calls / times], device)[0]) if in_lab else None
    dist.all_reduce(spent)
    return sent, 1e3 * spent.item() / dist.get_world_size() / calls / times


def _lab_rate() -> str | None:
    """Rate of this host's link in a lab; None outside of one."""
    return settings.text(labs.RATE_VARIABLE) if settings.given(labs.RATE_VARIABLE) else None


def link_name(ranks: int) -> str:
    """The ``link`` of a row: the rate in a lab, ``local`` on one machine, or ``network``."""
    if (rate := _lab_rate()) is not None:
        return rate or "unlimited"
    return "local" if int(os.environ.get("LOCAL_WORLD_SIZE") or ranks) == ranks else "network"


def _sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add in fp64, without an fp64 copy of each term."""
    total = torch.zeros(terms[0].shape, dtype=torch.float64, device=terms[0].device)
    for term in terms:
        total += term
    return total


def _energy(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).dot(x.view(-1))


class Case:
    """One message of Gaussian values, and what this rank must get.

    Args:
        op: as for `run`.
        size: of the message in bytes.
        ranks, rank: the world and this rank.
        dtype: of the message.
    """

    def __init__(self, op: str, size: int, ranks: int, rank: int, dtype: torch.dtype):
        self.op, self.ranks, self.rank = op, ranks, rank
        rows, cols = part_shape(op, size, ranks, dtype)
        parts = ranks if op in ("reduce_scatter", "all_to_all") else 1
        self.xs = [
            torch.randn(
                parts * rows, cols, generator=torch.Generator().manual_seed(r), dtype=torch.float32, device="cpu"
            ).to(dtype)
            for r in range(ranks)
        ]
        self.x = self.xs[rank]
        self.message_bytes = message_bytes(op, size, ranks, dtype)
        self.summed = op in ("all_reduce", "reduce_scatter")
        self.exact = _sum(self._terms()) if self.summed else torch.cat(self._terms()).double()

    def _terms(self) -> list[torch.Tensor]:
        """Each rank's contribution to this rank's result."""
        if self.op in ("reduce_scatter", "all_to_all"):
            return [x.chunk(self.ranks)[self.rank] for x in self.xs]
        return self.xs[1:] if self.op == "send" else self.xs

    def check(self, out: torch.Tensor, codec: Codec, chosen: str) -> float | None:
        """The SQNR of this rank's result in dB, None if it is exact.

        Raises:
            RuntimeError: it is wrong, or not what the other ranks have.
        """
        if self.op == "send" and self.rank:
            return None
        what = f"{self.op} of {self.message_bytes} bytes, {codec} {chosen}"
        if self.op in ("all_reduce", "all_gather"):
            digests: list[bytes] = [b""] * self.ranks
            data = out.contiguous().view(torch.uint8).numpy().tobytes()
            dist.all_gather_object(digests, hashlib.blake2b(data, digest_size=16).digest())
            other = next((r for r, digest in enumerate(digests) if digest != digests[0]), None)
            if other is not None:
                raise RuntimeError(f"{what}: rank {other} got other bits than rank 0")
        error = out.double().sub_(self.exact).abs_()
        noise = _energy(error)
        if chosen == "plain":
            # The backend rounds each of its R - 1 additions, in an order of its own; a copy has no error.
            reach = (
                _sum([x.abs() for x in self._terms()])
                if self.summed
                else torch.zeros((), dtype=torch.float64, device=out.device)
            )
            if not (error <= reach.mul_(self.ranks * torch.finfo(out.dtype).eps)).all():
                raise RuntimeError(f"{what}: rank {self.rank} is {error.max():.3g} away from the exact result")
        else:
            if not torch.equal(out, self._expected(codec, chosen)):
                raise RuntimeError(f"{what}: rank {self.rank} got other values than one process computes")
        return float(10 * torch.log10(_energy(self.exact) / noise)) if noise else None

    def _expected(self, codec: Codec, chosen: str) -> torch.Tensor:
        """The result that one process computes from the ranks' payloads, bit for bit."""
        if self.op == "all_reduce":
            return simulate.all_reduce(self.xs, codec, chosen, hosts=group_of(None).facts.hosts)
        first, second = codec.formats
        if self.op == "reduce_scatter":
            return simulate.all_reduce(self._terms(), first, "one_step")
        step = second if self.op == "all_gather" else first
        return torch.cat(
            [flashcomm.decode(flashcomm.encode(x, step), step, cols=x.shape[1], dtype=x.dtype) for x in self._terms()]
        )
