"""Compress dispatch and combine of vLLM's experts, around the gathers of its group of ranks.

    `GroupCoordinator.all_gatherv`                   dispatch, where it is given a list: hidden states, then routing
    `GroupCoordinator.reduce_scatterv`               combine
    `GroupCoordinator.reduce_scatterv_into_output`   combine, into a tensor of vLLM's; since 0.32

vLLM's all-to-all backend ``allgather_reducescatter``, its default, calls these for the group ``dp``, or ``ep`` where
the tokens of tensor-parallel ranks are split too. Its other backends exchange tokens inside of their own kernels.

vLLM 0.32 chooses this backend on CPUs too, but its `CpuCommunicator` has none of the three, so a mixture of experts
over several data-parallel ranks ends with a `NotImplementedError`. Where vLLM has none, ours send what is not
compressed. With ``--enable-expert-parallel`` its experts for CPUs end with a segmentation fault; without it they are
cut over the same ranks.

Separate from `flashcomm.integrations.vllm`, which replaces them.

Source: our own; the methods are those of vLLM 0.32.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from flashcomm.integrations.experts import Experts

BACKENDS = ("allgather_reducescatter", "naive", "pplx")
"""Values of ``--all2all-backend`` that vLLM serves by these methods; it replaces the last two by the first."""
METHODS = ("all_gatherv", "reduce_scatterv", "reduce_scatterv_into_output")


def why_not(arguments: Any, is_cpu: bool) -> str | None:
    """Return the reason that an engine with these ``EngineArgs`` cannot compress dispatch and combine, if there is one.

    Args:
        arguments: vLLM's; what a release does not have counts as its default.
        is_cpu: whether the engine runs on CPUs, where vLLM has one backend and takes it for any.
    """
    backend = getattr(arguments, "all2all_backend", None) or BACKENDS[0]
    if backend not in BACKENDS and not is_cpu:
        return f"--all2all-backend {backend} exchanges tokens inside of its own kernels: use {BACKENDS[0]}"
    if getattr(arguments, "enable_elastic_ep", False):
        return "--enable-elastic-ep makes groups that torch.distributed does not know: leave it out"
    if is_cpu and not arguments.enforce_eager:
        return "on CPUs vLLM compiles the experts' exchange into the model, which was not tried: give --enforce-eager"
    if is_cpu and arguments.enable_expert_parallel and not _cpu_experts_are_mapped():
        return (
            "on CPUs vLLM's experts look for expert 4 of 8 in the 4 that a rank holds, and the worker ends with a "
            "segmentation fault: leave --enable-expert-parallel out; each expert is then cut over the same ranks, and "
            "tokens are exchanged in the same way"
        )
    return None


def _cpu_experts_are_mapped() -> bool:
    """Whether vLLM's experts for CPUs use the map from all experts to those of a rank; in 0.32 they do not."""
    try:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    except ImportError:
        return False
    return inspect.getsource(CPUUnquantizedExperts.apply).count("expert_map") > 1


def gathering(experts_of: Callable[[Any], Experts | None], gather: Callable) -> Callable:
    """Wrap ``all_gatherv``.

    Args:
        experts_of: the exchange of a ``GroupCoordinator``; None where it stays vLLM's.
        gather: the method that is wrapped.
    """

    def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: "Sequence[int] | None" = None) -> Any:
        experts = experts_of(self)
        if experts is None or dim != 0 or not isinstance(input_, list) or not _tokens(input_):
            return gather(self, input_, dim, sizes)
        parts = list(sizes) if sizes else [input_[0].shape[0]] * self.world_size
        hidden, *routing = input_
        if not _has(self, "all_gatherv"):
            return [experts.dispatch(hidden, parts), *(experts.routing(x, parts) for x in routing)]
        plain = partial(_first, partial(gather, self, dim=dim, sizes=sizes))
        return [experts.dispatch(hidden, parts, plain), *gather(self, routing, dim, sizes)]

    return all_gatherv


def scattering(experts_of: Callable[[Any], Experts | None], scatter: Callable) -> Callable:
    """Wrap ``reduce_scatterv``; arguments as for `gathering`."""

    def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: "Sequence[int] | None" = None) -> Any:
        experts = experts_of(self)
        if experts is None or dim != 0:
            return scatter(self, input_, dim, sizes)
        plain = partial(scatter, self, dim=dim, sizes=sizes) if _has(self, "reduce_scatterv") else None
        return experts.combine(input_, sizes or _equal(input_, self.world_size), plain)

    return reduce_scatterv


def scattering_into(experts_of: Callable[[Any], Experts | None], scatter: Callable) -> Callable:
    """Wrap ``reduce_scatterv_into_output``; arguments as for `gathering`."""

    def reduce_scatterv_into_output(
        self: Any, input_: torch.Tensor, output: torch.Tensor, dim: int = -1, sizes: "Sequence[int] | None" = None
    ) -> torch.Tensor:
        experts = experts_of(self)
        if experts is None or dim != 0:
            return scatter(self, input_, output, dim, sizes)

        def plain(x: torch.Tensor) -> torch.Tensor:
            return scatter(self, x, output, dim, sizes)

        own = plain if _has(self, "reduce_scatterv") else None
        found = experts.combine(input_, sizes or _equal(input_, self.world_size), own)
        return output if found is output else output.copy_(found)

    return reduce_scatterv_into_output


WRAPPERS = dict(zip(METHODS, (gathering, scattering, scattering_into), strict=True))
"""Wrapper of each method, by its name."""


def _tokens(tensors: list) -> bool:
    return len(tensors) > 1 and tensors[0].dim() == 2 and all(x.shape[0] == tensors[0].shape[0] for x in tensors)


def _first(gather: Callable, x: torch.Tensor) -> torch.Tensor:
    return gather([x])[0]


def _equal(x: torch.Tensor, ranks: int) -> list[int]:
    return [x.shape[0] // ranks] * ranks


def _has(group: Any, method: str) -> bool:
    """Whether the communicator of a group has a method of its own; the base class only raises."""
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

    base = getattr(DeviceCommunicatorBase, method, None)
    return getattr(type(group.device_communicator), method, base) is not base
