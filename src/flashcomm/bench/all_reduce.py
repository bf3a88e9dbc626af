"""`flashcomm bench all_reduce`: compressed against plain over sizes, in one interleaved run per world size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

import flashcomm
from flashcomm.bench import launch
from flashcomm.bench.timing import interleaved

_ROW = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceRow:
    """One variant at one size; the fields are the columns of `results/all_reduce_*.jsonl`."""

    ranks: int
    backend: str
    dtype: str
    message_bytes: int
    codec: str
    algorithm: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    speedup: float
    """Median of the plain all-reduce over this variant's, from the same rounds."""
    wire_bytes: int
    """Bytes that one rank sends to others."""
    sqnr_db: float
    """Against the fp64 sum."""

    def as_dict(self) -> dict:
        """The row as JSON stores it."""
        return asdict(self)


def run(
    specs: Sequence[str], *, ranks: int, sizes: Sequence[int], algorithms: Sequence[str], repeats: int = 15
) -> list[AllReduceRow]:
    """Measure on `ranks` local ranks, bf16, rows of 4,096 values.

    Args:
        specs: codecs; ``none``, the plain all-reduce, is always measured.
        ranks: world size.
        sizes: message sizes in bytes; rounded up to whole values.
        algorithms: of ``one_step``, ``two_step``, ``auto``; combinations that a codec refuses are left out.
        repeats: timed rounds.

    Raises:
        flashcomm.bench.launch.RankError: a rank failed, or a result is wrong or differs between ranks.
    """
    return launch.run(_rank, (tuple(specs), tuple(sizes), tuple(algorithms), repeats), ranks=ranks)[0]


def _rank(
    specs: tuple[str, ...], sizes: tuple[int, ...], algorithms: tuple[str, ...], repeats: int
) -> list[AllReduceRow]:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    table = []
    for size in sizes:
        values = max(1, size // 2)
        shape = (values // _ROW, _ROW) if values % _ROW == 0 else (1, values)
        xs = [torch.randn(shape, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(ranks)]
        exact = torch.stack([x.double() for x in xs]).sum(0)
        x = xs[rank].to(device)
        out = torch.empty_like(x)
        pairs = [("none", "plain")]
        for spec in specs:
            for algorithm in algorithms:
                if spec != "none" and not (algorithm == "one_step" and ":" in spec):
                    pairs.append((spec, algorithm))
        variants, facts = {}, {}
        for spec, algorithm in pairs:
            call = lambda x=x, out=out, spec=spec, algorithm=algorithm: flashcomm.all_reduce(  # noqa: E731
                x, spec, algorithm=algorithm, out=out
            )
            before = flashcomm.stats()["wire_bytes"]
            call()
            sent = flashcomm.stats()["wire_bytes"] - before
            noise = (out.cpu().double() - exact).square().sum()
            same = out.clone()
            dist.broadcast(same, 0)
            if not torch.equal(same, out):
                raise RuntimeError(f"{spec} {algorithm}: rank {rank} got other bits than rank 0")
            variants[f"{spec}/{algorithm}"] = call
            facts[f"{spec}/{algorithm}"] = (
                spec,
                algorithm,
                sent,
                float(10 * torch.log10(exact.square().sum() / noise)),
            )
        times = interleaved(variants, repeats=repeats, before=dist.barrier, after=_drain(device))
        plain = times["none/plain"].p50_ms
        for name, (spec, algorithm, sent, sqnr) in facts.items():
            table.append(
                AllReduceRow(
                    ranks=ranks,
                    backend=dist.get_backend(),
                    dtype="bfloat16",
                    message_bytes=x.numel() * 2,
                    codec=str(flashcomm.codec(spec)),
                    algorithm=algorithm,
                    p20_ms=times[name].p20_ms,
                    p50_ms=times[name].p50_ms,
                    p80_ms=times[name].p80_ms,
                    speedup=plain / times[name].p50_ms,
                    wire_bytes=sent,
                    sqnr_db=sqnr,
                )
            )
    return table


def _drain(device: torch.device):
    """What ends a timed call: the device is done and the slowest rank has arrived."""

    def drain():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier()

    return drain
