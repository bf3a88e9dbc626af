"""The sums of an inference engine's worker: compressed where the policy says so, otherwise the engine's own.

What every engine needs and no engine knows: which messages are worth compressing, whether this link rewards it, a line
at the start that says so, and counts of everything that stayed plain. The adapters beside this file know the engines.

Source: our own.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from flashcomm import collectives, planner
from flashcomm.codecs import FLOAT_DTYPES, Codec, Plain
from flashcomm.collectives.state import state_of
from flashcomm.collectives.stats import record_plain
from flashcomm.integrations import worker_metrics
from flashcomm.policy import Policy

OPTION = "flashcomm"
"""The key of what an engine's own options say to us."""
_LARGE_BYTES = 16 << 20


def asked_for(options: Any = None) -> Policy | None:
    """What the engine's options or the environment ask for; the options win.

    Args:
        options: a mapping whose key ``flashcomm`` is a codec, the path of a policy (``.toml``), or a policy's keys.

    Returns:
        A policy that compresses something, or None.

    Raises:
        ValueError: a policy that cannot be read, is not allowed, or that no engine can serve.

    >>> str(asked_for({"flashcomm": {"codec": "int4g128", "phase": "all"}}))
    'int4g128; prefill and decode, from 64 KiB'
    """
    given = options.get(OPTION) if isinstance(options, Mapping) else None
    if given is None:
        policy = Policy.from_environment()
    else:
        try:
            policy = _parsed(given)
        except ValueError as error:
            raise ValueError(f"option {OPTION}: {error}") from None
    if policy is None or not policy.codecs:
        return None
    if unbound := [str(codec) for codec in policy.codecs if codec.unbound]:
        raise ValueError(
            f"codec {unbound[0]} needs a calibration, which engines do not have yet: use a codec without "
            "keep or static, such as int4g32"
        )
    return policy


def _parsed(given: Any) -> Policy:
    if isinstance(given, Mapping):
        return Policy.from_keys(given)
    if not isinstance(given, str):
        raise ValueError(f"{json.dumps(given)}: give a codec, the path of a .toml file, or the keys of a policy")
    return Policy.load(given) if given.endswith(".toml") else Policy(codec=given)


def keys_of(policy: Policy) -> dict[str, Any]:
    """A policy as `asked_for` reads it, in types that JSON has: what an engine passes on to its workers."""
    return {**asdict(policy), "layers": [asdict(rule) for rule in policy.layers]}


class Sums:
    """The sums of one tensor-parallel group in this process.

    Args:
        policy: what is compressed.
        group: the ranks, with the backend that carries this device's tensors.
        in_decode: whether the step that runs has no prompt in it; asked during each sum.
        log: for the line that says what is done.
    """

    def __init__(self, policy: Policy, group: dist.ProcessGroup, in_decode: Callable[[], bool], log: logging.Logger):
        self.policy, self.group, self._in_decode, self._log = policy, group, in_decode, log
        self._state = state_of(group)
        self._declined: dict[tuple[int, Codec], str | None] = {}

    def reduce(self, x: torch.Tensor, codec: Codec, plain: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The sum of `x` over the ranks.

        Args:
            x: of any shape; not changed by us.
            codec: wire format, if it is compressed.
            plain: the engine's own sum, for what is not.
        """
        if reason := self._why_plain(x, codec):
            record_plain("all_reduce", reason)
            return plain(x)
        try:
            result = collectives.all_reduce(x, codec, self.group, algorithm=self.policy.algorithm)
        except Exception as error:
            worker_metrics.count_error(error)
            raise
        assert isinstance(result, torch.Tensor)
        return result

    def _why_plain(self, x: torch.Tensor, codec: Codec) -> str | None:
        """Decided from facts that are equal on all ranks."""
        message_bytes = x.numel() * x.element_size()
        if message_bytes < self.policy.min_bytes:
            return f"message under {self.policy.min_bytes / 1024:g} KiB"
        if x.dtype not in FLOAT_DTYPES:
            return f"dtype {x.dtype}"
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return "captured in a CUDA graph"
        if self.policy.phase == "prefill" and self._in_decode():
            return "decode step"
        if isinstance(codec, Plain):
            return "codec none"
        key = message_bytes, codec
        if key not in self._declined:
            plan = self._plan(message_bytes, codec)
            self._declined[key] = plan.reason if plan.declined else None
        return self._declined[key]

    def meet(self, device: torch.device):
        """Learn how the ranks reach each other, and say what will be done; before the first sum, on all ranks."""
        state = self._state
        state.meet(device)
        # On all ranks, because it refuses an algorithm that this group cannot serve.
        plan = self._plan(_LARGE_BYTES, self.policy.codecs[0])
        if state.rank:
            return
        route = (
            "shared memory" if state.shared else "connections" if state.connections else dist.get_backend(self.group)
        )
        but = f"; but auto sends values as they are: {plan.reason}" if plan.declined else ""
        self._log.info("flashcomm compresses %s; %d ranks over %s%s", self.policy, state.ranks, route, but)

    def _plan(self, message_bytes: int, codec: Codec) -> planner.Plan:
        return planner.choose(message_bytes, self._state.facts, codec, algorithm=self.policy.algorithm)
