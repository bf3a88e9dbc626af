"""Compress the sums of SGLang's tensor-parallel ranks, and the hops between its pipeline stages. Off by default.

    FLASHCOMM_CODEC=int8g128 python -m sglang.launch_server --model-path MODEL --tp 2
    FLASHCOMM_POLICY=policy.toml python -m sglang.launch_server --model-path MODEL --tp 2

How: SGLang finds this as a plugin. Hooks around methods of its groups of ranks, by its own registry:

    `GroupCoordinator.__init__`              the ranks meet, and the log says what will be done
    `GroupCoordinator.all_reduce`            eager sums of the group named ``tp``
    `GroupCoordinator._all_reduce_out_place` its sums in compiled graphs, whose operator lets it choose the method
    `GroupCoordinator.send_tensor_dict`      hops of the group named ``pp``: hidden states and residual, not the results
    `GroupCoordinator.recv_tensor_dict`      the same, on the next stage
    `ModelRunner.forward`                    whether the step that runs is a decode step

Not compressed: sums that SGLang fuses with the norm behind them, of groups with other names (attention under data
parallelism), or captured in a CUDA graph. Not supported: rules for layers.

Not run in an engine yet; docs/sglang.md says what was tested.

Source: our own; hooks and their places are those of SGLang 0.5.23.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

if importlib.util.find_spec("sglang") is None:
    raise ImportError("flashcomm.integrations.sglang needs SGLang: pip install sglang (docs/sglang.md says what for)")

from flashcomm import codecs
from flashcomm.integrations import worker_metrics
from flashcomm.integrations.experts import asks
from flashcomm.integrations.hops import Hops
from flashcomm.integrations.sums import Sums, asked_for
from flashcomm.policy import Policy

GROUP = "sglang.srt.distributed.parallel_state.GroupCoordinator"
RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"

_log = logging.getLogger("sglang.flashcomm")


def register():
    """Place the hooks if the environment asks for compression; SGLang calls this once in each of its processes.

    Raises:
        SystemExit: a wrong policy. SGLang would log any other exception and serve without us.
    """
    try:
        policy = asked_for()
        if policy and policy.layers:
            raise ValueError("SGLang's layers cannot be told apart yet: leave [[layers]] out of the policy")
        if policy and policy.overlap != "off":
            raise ValueError("SGLang's steps cannot run in parts yet: leave overlap out of the policy")
        if policy and asks(policy):
            raise ValueError(
                "SGLang's exchange of experts is not compressed yet: leave dispatch and combine out of [hops]"
            )
    except ValueError as error:
        raise SystemExit(f"flashcomm: {error}") from None
    if policy is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = Hooks(policy)
    for target, hook in (
        (f"{GROUP}.__init__", hooks.meet),
        (f"{GROUP}.all_reduce", hooks.all_reduce),
        (f"{GROUP}._all_reduce_out_place", hooks.all_reduce_out_place),
        (f"{GROUP}.send_tensor_dict", hooks.send_tensor_dict),
        (f"{GROUP}.recv_tensor_dict", hooks.recv_tensor_dict),
        (f"{RUNNER}.forward", hooks.forward),
    ):
        HookRegistry.register(target, hook, HookType.AROUND)


class Hooks:
    """The hooks of one process; each gets the function that it wraps, and its arguments.

    Args:
        policy: says what is compressed.
    """

    def __init__(self, policy: Policy):
        self._policy, self._codec = policy, codecs.parse(policy.codec)
        self._sums: dict[str, Sums] = {}
        self._hops: dict[str, Hops] = {}
        self._in_decode = False
        self.reporter: worker_metrics.Reporter | None = None

    def meet(self, init: Callable, group: Any, *args: Any, **kwargs: Any):
        """Make a group, on all of its ranks."""
        init(group, *args, **kwargs)
        kind, name = group.unique_name.split(":")[0], group.unique_name
        if group.world_size > 1 and kind == "tp" and self._policy.codecs:
            sums = Sums(self._policy, group.device_group, lambda: self._in_decode, _log)
            sums.meet(group.device)
            self._sums[name] = sums
        elif group.world_size > 1 and kind == "pp" and self._policy.hops.pp != "none":
            hops = Hops(self._policy)
            hops.meet(group.cpu_group, group.device)
            self._hops[name] = hops
            if group.rank == 0:
                _log.info(hops.line(group.world_size))
        else:
            return
        self.reporter = self.reporter or worker_metrics.Reporter(group.rank, _log)

    def all_reduce(self, plain: Callable, group: Any, x: torch.Tensor) -> torch.Tensor:
        """Sum; in a graph that is being compiled, SGLang's operator is called instead, which calls the next method."""
        if torch.compiler.is_compiling() or (sums := self._sums.get(group.unique_name)) is None:
            return plain(group, x)
        return sums.reduce(x, self._codec, lambda x: plain(group, x))

    def all_reduce_out_place(self, plain: Callable, group: Any, x: torch.Tensor, method: str) -> torch.Tensor:
        """Sum within SGLang's operator."""
        sums = self._sums.get(group.unique_name)
        # An eager sum has come to `all_reduce` before, and its method is chosen.
        if sums is None or method != "auto":
            return plain(group, x, method)
        return sums.reduce(x, self._codec, lambda x: plain(group, x, method))

    def send_tensor_dict(
        self, plain: Callable, group: Any, tensor_dict: Any, dst: Any = None, all_gather_group: Any = None, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Send to another stage: what the next one computes from, encoded."""
        hops = self._hops.get(group.unique_name)
        if hops is not None and tensor_dict.get("__msg_type__") == "proxy":
            share = (all_gather_group.rank_in_group, all_gather_group.world_size) if all_gather_group else ()
            tensor_dict = hops.encoded(tensor_dict, *share)
        return plain(group, tensor_dict, dst, all_gather_group, *args, **kwargs)

    def recv_tensor_dict(self, plain: Callable, group: Any, src: Any = None, all_gather_group: Any = None) -> Any:
        """Receive from another stage."""
        tensors = plain(group, src, all_gather_group)
        hops = self._hops.get(group.unique_name)
        if hops is not None and tensors is not None:
            hops.decode(tensors, lambda x: all_gather_group.all_gather(x, dim=0))
        return tensors

    def forward(self, run: Callable, runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step of the model."""
        self._in_decode = batch.forward_mode.is_decode()
        return run(runner, batch, *args, **kwargs)
