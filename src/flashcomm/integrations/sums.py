"""Make a model's sums as the policy says: compressed, or plain with a reason that is counted.

`Policy.choose` decides for every engine, and `apply` carries the decision out. Only the meaning of plain differs from
engine to engine, so it is an argument; docs/choosing.md lists what it is. `Sums` adds what inference servers need and
do not have: whether this link rewards compression, and a line at the start that says so.

Source: our own.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flashcomm import collectives, planner
from flashcomm.codecs import Codec, Plain
from flashcomm.collectives.call import Work, start
from flashcomm.collectives.group import group_of
from flashcomm.collectives.rules import ALL_REDUCE
from flashcomm.collectives.stats import record_plain, warn_declined
from flashcomm.integrations import worker_metrics
from flashcomm.policy import Choice, Policy

OPTION = "flashcomm"
"""Key of the engine's own options that holds our policy."""
_LARGE_BYTES = 16 << 20

Result = TypeVar("Result")
_count = partial(record_plain, "all_reduce")


def apply(
    choice: Choice,
    *,
    compressed: Callable[[], Result],
    plain: Callable[[], Result],
    count: Callable[[str], object] = _count,
) -> Result:
    """Make one sum the way that a policy chose.

    Args:
        choice: from `Policy.choose`.
        compressed: makes the sum in the chosen codec.
        plain: makes the sum uncompressed, as this engine does it.
        count: called with the reason if the sum stays plain; counts in `flashcomm.stats()` if not given.
    """
    if choice.reason is None:
        return compressed()
    count(choice.reason)
    return plain()


def start_plain(x: torch.Tensor, codec: Codec, group: Any, reason: str | None, **options: Any) -> Any:
    """Start an uncompressed sum of our own, by the backend, or by the fastest algorithm if a codec was asked for.

    Args:
        x: the values.
        codec: of the module, which this sum does without.
        group: the ranks.
        reason: why it stays plain; counted.
        options: of `flashcomm.all_reduce`: ``out``, ``async_op``.
    """
    exact = codec if isinstance(codec, Plain) else "bf16" if x.dtype == torch.bfloat16 else "fp32"
    return start(ALL_REDUCE, x, exact, group, because=reason, **options)


def refuse_unbound(codecs: Iterable[Codec], why: str | None = None):
    """Refuse codecs that lack their calibration.

    Args:
        codecs: all that can be used.
        why: reason that the caller cannot use a calibration; None if it can and was given none.

    Raises:
        ValueError: a codec that lacks its calibration.
    """
    for codec in codecs:
        if codec.unbound and why is None:
            codec.check(1)
        if codec.unbound:
            raise ValueError(
                f"codec {codec} needs a calibration, {why}: use a codec without keep or static, such as int4g32"
            )


def asked_for(options: Any = None) -> Policy | None:
    """Read the policy that the engine's options or the environment ask for; the options win.

    Args:
        options: a mapping whose key ``flashcomm`` is a codec, the path of a policy (``.toml``), or a policy's keys.

    Returns:
        A policy that compresses something or overlaps, or None.

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
    if policy is None or not (policy.codecs or policy.hops.codecs or policy.overlap != "off"):
        return None
    refuse_unbound((*policy.codecs, *policy.hops.codecs), "which engines do not have yet")
    return policy


def _parsed(given: Any) -> Policy:
    if isinstance(given, Mapping):
        return Policy.from_keys(given)
    if not isinstance(given, str):
        raise ValueError(f"{json.dumps(given)}: give a codec, the path of a .toml file, or the keys of a policy")
    return Policy.load(given) if given.endswith(".toml") else Policy(codec=given)


def keys_of(policy: Policy) -> dict[str, Any]:
    """Convert a policy to types that JSON has; an engine passes them to its workers, and `asked_for` reads them."""
    return {**asdict(policy), "layers": [asdict(rule) for rule in policy.layers]}


class Sums:
    """The sums of one tensor-parallel group in this process.

    Args:
        policy: says what is compressed; may be assigned to between steps, on all ranks alike.
        group: the ranks, with the backend that carries this device's tensors.
        in_decode: whether the step that runs is a decode step; asked during each sum.
        log: for the line that says what is done.
    """

    def __init__(self, policy: Policy, group: dist.ProcessGroup, in_decode: Callable[[], bool], log: logging.Logger):
        self.policy, self.group, self._in_decode, self._log = policy, group, in_decode, log
        self._group = group_of(group)
        self._declined: dict[tuple[int, Codec, str], str | None] = {}
        self.hosts: int | None = None
        """Number of hosts, once the ranks have met; None if they do not know."""
        self.compresses = False
        """Whether large sums are compressed, once the ranks have met."""

    def reduce(self, x: torch.Tensor, codec: Codec, plain: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Sum `x` over the ranks.

        Args:
            x: of any shape; not changed by us.
            codec: wire format, if it is compressed.
            plain: the engine's own sum.
        """
        choice = self._choose(x, codec)
        return apply(choice, compressed=partial(self._compressed, x, choice), plain=partial(plain, x))

    def start(self, x: torch.Tensor, codec: Codec) -> Work:
        """Start to sum `x`; a plain sum is ours, too, because the engine's own may block.

        Args:
            x: not changed; must not change before the sum is there.
            codec: wire format, if it is compressed.
        """
        choice = self._choose(x, codec)
        options = {"group": self.group, "async_op": True}
        return apply(
            choice,
            compressed=lambda: collectives.all_reduce(x, choice.codec, algorithm=choice.algorithm, **options),  # pyright: ignore[reportReturnType]
            plain=lambda: start_plain(x, codec, reason=choice.reason, **options),
            # The call itself counts the reason.
            count=lambda reason: None,
        )

    def _compressed(self, x: torch.Tensor, choice: Choice) -> torch.Tensor:
        try:
            result = collectives.all_reduce(x, choice.codec, self.group, algorithm=choice.algorithm)
        except Exception as error:
            worker_metrics.count_error(error)
            raise
        assert isinstance(result, torch.Tensor)
        return result

    def _choose(self, x: torch.Tensor, codec: Codec) -> Choice:
        """Follow the policy, unless the sum is captured in a CUDA graph or the planner declines it."""
        message_bytes = x.numel() * x.element_size()
        choice = self.policy.choose(message_bytes, x.dtype, decoding=self._in_decode, codec=codec)
        if choice.reason:
            return choice
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return choice.declined("captured in a CUDA graph")
        key = message_bytes, codec, choice.algorithm
        if key not in self._declined:
            plan = self._plan(message_bytes, codec, x.device)
            self._declined[key] = plan.reason if plan.declined else None
            if plan.declined:
                warn_declined(str(codec), plan.reason)
        reason = self._declined[key]
        return choice.declined(reason) if reason else choice

    def meet(self, device: torch.device):
        """Learn how the ranks reach each other, and log what will be done; before the first sum, on all ranks."""
        meeting = self._group.meet(device)
        but = ""
        if self.policy.codecs:
            # On all ranks, because it refuses an algorithm that this group cannot serve.
            plan = self._plan(_LARGE_BYTES, self.policy.codecs[0], device)
            but = f"; but auto sends values as they are: {plan.reason}" if plan.declined else ""
        self.hosts = self._group.facts_for(device).hosts
        self.compresses = bool(self.policy.codecs) and not but
        ranks = self._group.ranks
        if ranks.rank:
            return
        self._log.info(
            "flashcomm compresses %s; %d ranks over %s%s", self.policy, ranks.world_size, meeting.carrier, but
        )

    def _plan(self, message_bytes: int, codec: Codec, device: torch.device) -> planner.Plan:
        facts = self._group.facts_for(device)
        return planner.choose(message_bytes, facts, codec, algorithm=self.policy.algorithm)
