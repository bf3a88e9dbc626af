"""All-reduces in one launch over torch's symmetric memory: GPUs that write to each other, or ranks that share one GPU.

Opt-in (``FLASHCOMM_FUSED=1``), because no GPU has run it yet; without it, and wherever it does not serve a call, ranks
exchange payloads over their process group. Nothing here waits for the device.

Hazard: ranks of which one has been lost know it at their next call, not in the one that waited; that one's result is
not valid. Launches of one group must not run at the same time: a stream waits for the one before it.

Source: `torch.distributed._symmetric_memory`; the protocol is that of `flashcomm.kernels.gpu.tiles.exchange`.
"""

import os
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from flashcomm import kernels
from flashcomm.codecs import Codec

if TYPE_CHECKING:
    from flashcomm.collectives.state import GroupState

SIZE_BYTES = 64 << 20
"""Of each rank's memory; longer messages take several launches."""
# A look at a flag of one's own GPU takes some 0.5 us.
_LOOKS_PER_S = 2_000_000


def open_memory(state: "GroupState", device: torch.device) -> tuple[Any, str]:
    """(`kernels.fused.Peers`, "") if all ranks could map each other's memory; (None, why) on all if one could not."""
    peers, why = None, "" if os.environ.get("FLASHCOMM_FUSED") == "1" else "FLASHCOMM_FUSED=1 is not set"
    if not why:
        try:
            peers = _map(state, device)
        except (ImportError, RuntimeError) as error:
            why = f"no symmetric memory: {str(error).splitlines()[0]}"
    for rank, refusal in enumerate(state.tell(why)):
        if refusal:
            return None, f"rank {rank}: {refusal}"
    return peers, ""


def _map(state: "GroupState", device: torch.device) -> Any:
    import torch.distributed._symmetric_memory as symmetric_memory

    from flashcomm.kernels import fused

    memory = symmetric_memory.empty(SIZE_BYTES, dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)
    handle = symmetric_memory.rendezvous(memory, group=state.group)
    return fused.Peers(
        rank=state.rank,
        buffers=torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device),
        size_bytes=SIZE_BYTES,
        epochs=torch.zeros(fused.BLOCKS, dtype=torch.int32, device=device),
        lost=torch.zeros(1, dtype=torch.int32, pin_memory=True),
        patience=min(int(state.timeout_s * _LOOKS_PER_S), 2**31 - 1),
        streams=[torch.cuda.current_stream(device)],
        keep=(memory, handle),
    )


def mover(name: str, codec: Codec, x: torch.Tensor, state: "GroupState") -> Any:
    """The function that runs an all-reduce of rows like x in one launch; None where that does not serve it."""
    if name not in ("one_step", "two_step") or not x.is_cuda or not x.numel():
        return None
    peers = state.symmetric(x.device)
    if peers is None or kernels.any_missing(codec, "cuda"):
        return None
    from flashcomm.kernels import fused

    if fused.row_length(x.shape[1], codec) is None:
        return None
    return partial(_run, name, peers)


def _run(name: str, peers: Any, x: torch.Tensor, codec: Codec, state: "GroupState", out: torch.Tensor) -> int:
    from flashcomm.kernels import fused

    stream = torch.cuda.current_stream(x.device)
    # A graph that is captured may wait for nothing outside of it.
    if stream != peers.streams[-1] and not torch.cuda.is_current_stream_capturing():
        stream.wait_stream(peers.streams[-1])
        peers.streams[:] = [stream]
    fused.all_reduce(x.contiguous(), codec, peers, out, name)
    return fused.sent_bytes(name, x.shape[0], x.shape[1], codec, state.ranks)
