"""Encode and decode what the pipeline stages of vLLM hand on, around two methods of its group of ranks.

    `GroupCoordinator.isend_tensor_dict`   encodes, then sends as ever
    `GroupCoordinator.irecv_tensor_dict`   receives as ever, and decodes once vLLM has waited

`send_tensor_dict` and `recv_tensor_dict` call these. Separate from `flashcomm.integrations.vllm`, which replaces them
for the group named ``pp`` alone.

Source: our own; the methods and what they return are those of vLLM 0.27.1 to 0.32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from flashcomm.integrations.hops import Hops


def sending(hops_of: Callable[[Any], Hops | None], isend: Callable) -> Callable:
    """Wrap ``isend_tensor_dict``.

    Args:
        hops_of: the hops of a ``GroupCoordinator``; None where they stay vLLM's.
        isend: the method that is wrapped.
    """

    def isend_tensor_dict(
        self: Any, tensor_dict: dict[str, Any], dst: Any = None, all_gather_group: Any = None, *rest: Any, **more: Any
    ):
        if (hops := hops_of(self)) is not None:
            rank, ranks = (all_gather_group.rank_in_group, all_gather_group.world_size) if all_gather_group else (0, 1)
            gathers = (rest[0] if rest else more.get("all_gather_tensors")) or {}
            apart = [name for name, gathered in gathers.items() if not gathered]
            tensor_dict = hops.encoded(tensor_dict, rank, ranks, apart)
        return isend(self, tensor_dict, dst, all_gather_group, *rest, **more)

    return isend_tensor_dict


def receiving(hops_of: Callable[[Any], Hops | None], irecv: Callable) -> Callable:
    """Wrap ``irecv_tensor_dict``; arguments as for `sending`."""

    def irecv_tensor_dict(self: Any, src: Any = None, all_gather_group: Any = None, *rest: Any, **more: Any):
        tensors, handles, afterwards = irecv(self, src, all_gather_group, *rest, **more)
        hops = hops_of(self)
        if hops is None or tensors is None:
            return tensors, handles, afterwards
        gather = partial(all_gather_group.all_gather, dim=0) if all_gather_group else _none_to_gather
        return tensors, handles, [*afterwards, partial(hops.decode, tensors, gather)]

    return irecv_tensor_dict


def _none_to_gather(x: Any) -> Any:
    raise RuntimeError("a share of a hop came to a stage that gathers none: give all stages as many ranks")
