"""GPU memory that peers write to, by torch's symmetric memory.

Opt-in (``FLASHCOMM_FUSED=1``), because no GPU has run it yet; without it, and wherever it does not serve a call, ranks
send messages. See docs/gpu.md.

Hazard: if a rank is lost, the others learn it at their next call, not in the one that waited; the result of that one is
not valid. Launches of one group must not run at the same time: a stream waits for the one before it.

Source: `torch.distributed._symmetric_memory`; the protocol is that of `exchange`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flashcomm.codecs import Codec
from flashcomm.transports.base import Ranks, Run, Step, Task

T = TypeVar("T")
SIZE_BYTES = 64 << 20
"""Bytes of each rank's memory; longer messages take several launches."""
# A look at a flag of one's own GPU takes some 0.5 us.
_LOOKS_PER_S = 2_000_000


class SymmetricMemory:
    """A `base.Memory` on GPUs."""

    name = "symmetric memory"

    def __init__(self, peers: Any, hot: Any):
        self._peers, self._hot = peers, hot
        self._loaded: set[tuple[str, Codec, torch.dtype, int]] = set()

    @classmethod
    def open(cls, ranks: Ranks, group: dist.ProcessGroup, device: torch.device) -> "tuple[SymmetricMemory | None, str]":
        """Map memory: (memory, "") on every rank, or (None, why) on every rank if one could not."""
        # Blocks wait for those of other ranks, so there are no more than find room on every GPU.
        fewest = min(ranks.each(Step.SYMMETRIC, lambda: _processors(device)))
        made, why = mapped(ranks, device, SIZE_BYTES, lambda memory: _map(memory, ranks, group, device, fewest))
        return (cls(*made), "") if made else (None, why)

    def load(self, task: Task):
        """See `base.Memory`. After the first sum in a format no other number of rows compiles anything."""
        from flashcomm.transports.symmetric import collective, launch

        kind = task.name, task.codec, task.dtype, task.cols
        if kind in self._loaded:
            return
        if collective.serves(task, len(self._hot.memory)):
            collective.load(task, self._hot)
        elif launch.serves(task):
            launch.load(task, self._peers)
        else:
            return
        self._loaded.add(kind)

    def prepare(self, task: Task, finish: Callable[[], object]) -> Run | None:
        """See `base.Memory`."""
        # Imports Triton.
        from flashcomm.transports.symmetric import collective, launch

        return collective.prepare(task, self._hot) or launch.prepare(task, self._peers)

    def abandon(self, why: str):
        """See `base.Memory`. The other ranks find out by their patience."""


def mapped(
    ranks: Ranks, device: torch.device, size_bytes: int, map_it: Callable[[torch.Tensor], T]
) -> tuple[T | None, str]:
    """Allocate zeros on every rank and map them: (result, "") on every rank, or (None, why) on every rank.

    Args:
        ranks: of the group.
        device: of the memory.
        size_bytes: of each rank's memory.
        map_it: maps this rank's memory for all ranks; all come there together.
    """
    made: list[Any] = []

    def attempt(step: Callable[[], Any]) -> str:
        try:
            made.append(step())
        except (ImportError, RuntimeError) as error:
            return f"no symmetric memory: {str(error).splitlines()[0]}"
        return ""

    # Mapping is collective: a rank that could not allocate would leave the others waiting in it.
    for step in (lambda: _allocate(device, size_bytes), lambda: map_it(made[0])):
        for rank, refusal in enumerate(ranks.each(Step.SYMMETRIC, lambda step=step: attempt(step))):
            if refusal:
                return None, f"rank {rank}: {refusal}"
    return made[1], ""


def _allocate(device: torch.device, size_bytes: int) -> torch.Tensor:
    import torch.distributed._symmetric_memory as symmetric_memory

    memory = symmetric_memory.empty(size_bytes, dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)
    return memory


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def _map(
    memory: torch.Tensor, ranks: Ranks, group: dist.ProcessGroup, device: torch.device, processors: int
) -> tuple[Any, Any]:
    """The peers of `launch`, in the first half of the memory, and those of `collective`, in the second."""
    import torch.distributed._symmetric_memory as symmetric_memory

    from flashcomm.transports.symmetric import collective, launch

    handle = symmetric_memory.rendezvous(memory, group=group)
    buffers = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
    # Either kind of launch waits for the other.
    both: dict[str, Any] = {
        "rank": ranks.rank,
        "size_bytes": SIZE_BYTES // 2,
        "lost": torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=True),
        "patience": min(int(ranks.timeout_s * _LOOKS_PER_S), 2**31 - 1),
        "streams": [torch.cuda.current_stream(device)],
        "keep": (memory, handle),
    }
    return (
        launch.Peers(buffers=buffers, epochs=torch.zeros(2, launch.BLOCKS, dtype=torch.int32, device=device), **both),
        collective.Peers(
            memory=buffers + SIZE_BYTES // 2,
            state=torch.zeros(4, dtype=torch.int64, device=device),
            processors=processors,
            **both,
        ),
    )
