"""Digests of payloads and results, recorded once and committed: a change of the core must not change a bit of them.

`python tests/recorded.py` writes `recorded.json` anew, from the simulation in one process; that is a change of the wire
format, and belongs into the CHANGELOG.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import formats
from flashcomm import simulate
from flashcomm.codecs import Codec, Pair, parse

FILE = Path(__file__).with_suffix(".json")
CASES = (((5, 300), torch.bfloat16), ((3, 2, 64), torch.float16), ((1, 1024), torch.float32))
"""(shape, dtype) of the tensors: rows that no group divides, more than two dimensions, and one row to cut."""
WORLDS = (1, 2, 3, 4, 5, 6, 7, 8)
_CALIBRATED_RANKS = 3
SPECS = (*formats.SPECS, "int4g128:int8g128", "bf16:int5g100", "bf16", "fp32")
LEVELS = ("int4g128", "int8g128/int4g128:int8g128", "fp32/mxfp4", "bf16:int8g128/int2g32+spike")
HOSTS = ((4, 2), (6, 2), (6, 3), (8, 2), (8, 4))
"""(ranks, hosts) of the hierarchical all-reduce."""


def tensor(rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Values with heavy tails and an outlier feature, from integer arithmetic: the same on every machine."""
    count = torch.Size(shape).numel()
    mixed = (torch.arange(count, dtype=torch.int64) + 7919 * rank + 1) * 2654435761 % 65521
    uniform = (mixed - 32760).double() / 32768
    x = (4 * uniform**3).reshape(*shape)
    x[..., shape[-1] // 3] *= 64
    return x.to(dtype)


def bound(spec: str, cols: int, rank: int) -> Codec:
    """The codec, calibrated where it needs to be."""
    codec = parse(spec)
    return formats.bound(spec, cols, rank) if codec.unbound else codec


def worlds(spec: str) -> tuple[int, ...]:
    """World sizes that the codec serves here: `formats.bound` calibrates three ranks."""
    return WORLDS[:_CALIBRATED_RANKS] if parse(spec).unbound else WORLDS


def algorithms(spec: str) -> tuple[str, ...]:
    """Algorithms that serve the codec on one level."""
    return ("two_step",) if isinstance(parse(spec), Pair) else ("one_step", "two_step")


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """A short hash of all bytes."""
    found = hashlib.blake2b(digest_size=8)
    for x in tensors:
        found.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def payloads(spec: str, encode: Callable[[torch.Tensor, Codec], torch.Tensor]) -> str:
    """The digest of what `encode` makes of every shape and dtype, in each of the codec's formats."""
    found = []
    for shape, dtype in CASES:
        for codec in dict.fromkeys(bound(spec, shape[-1], 0).formats):
            found.append(encode(tensor(0, shape, dtype).reshape(-1, shape[-1]), codec))
    return digest(found)


AllReduce = Callable[[Sequence[torch.Tensor], Sequence[Codec], str, int], torch.Tensor]
"""(each rank's tensor, each rank's codec, algorithm, hosts) -> the result of every rank."""


def sums(all_reduce: AllReduce, spec: str, algorithm: str, ranks: int, hosts: int = 0) -> str:
    """The digest of the sums of every shape and dtype."""
    found = []
    for shape, dtype in CASES:
        xs = [tensor(rank, shape, dtype) for rank in range(ranks)]
        found.append(all_reduce(xs, [bound(spec, shape[-1], rank) for rank in range(ranks)], algorithm, hosts))
    return digest(found)


def _simulated(xs: Sequence[torch.Tensor], codecs: Sequence[Codec], algorithm: str, hosts: int) -> torch.Tensor:
    return simulate.all_reduce(xs, codecs[0], algorithm, hosts=hosts)


def record() -> dict:
    """All digests, of this version."""
    from flashcomm import kernels

    found = {"payloads": {spec: payloads(spec, kernels.encode) for spec in SPECS}, "sums": {}, "levels": {}}
    for spec in SPECS:
        for algorithm in algorithms(spec):
            found["sums"][f"{spec} {algorithm}"] = [sums(_simulated, spec, algorithm, ranks) for ranks in worlds(spec)]
    for spec in LEVELS:
        found["levels"][spec] = [sums(_simulated, spec, "hierarchical", ranks, hosts) for ranks, hosts in HOSTS]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps(record(), indent=1) + "\n")
    sys.stdout.write(f"wrote {FILE}\n")
