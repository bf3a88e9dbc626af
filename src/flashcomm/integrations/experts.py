"""Compress the exchange of an engine's ranks that share out the experts: dispatch and combine, each in its own codec.

    dispatch   an all-gather: every rank gets the hidden states of all ranks' tokens
    combine    a reduce-scatter: every rank gets the sums of its tokens over all ranks' experts

Ranks have different numbers of tokens, which all of them know. What decides is equal on all ranks: the size of the
longest part, the dtype and the link. Weights and numbers of chosen experts travel as they are.

Source: our own; the two steps are those of vLLM's ``allgather_reducescatter``.
"""

from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist

from flashcomm import kernels, planner
from flashcomm.codecs import Codec
from flashcomm.collectives.call import Work, start
from flashcomm.collectives.group import group_of
from flashcomm.collectives.rules import ALL_GATHER, REDUCE_SCATTER, Splits, Verb
from flashcomm.collectives.stats import record_plain
from flashcomm.integrations import worker_metrics
from flashcomm.integrations.agreement import same_policy
from flashcomm.policy import Choice, Policy

KINDS = ("dispatch", "combine")
"""Fields of `flashcomm.policy.Hops` that count here."""
ROUTING = "weights and numbers of experts"
"""Reason that what is dispatched beside hidden states is counted as plain."""

_MAX_DECISIONS = 4096

Plain = Callable[[torch.Tensor], torch.Tensor]


def asks(policy: Policy) -> bool:
    """Whether a policy has a codec for dispatch or for combine."""
    return any(kind in policy.hops.kinds for kind in KINDS)


class Experts:
    """The exchange between the ranks of one group, in this process.

    Args:
        policy: its codecs for dispatch and combine, ``min_bytes`` and ``algorithm`` count; may be assigned to between
            steps, on all ranks alike.
        group: the ranks, with the backend that carries this device's tensors.
    """

    def __init__(self, policy: Policy, group: dist.ProcessGroup):
        self.policy, self.group = policy, group
        self._group = group_of(group)
        self._declined: dict[tuple[int, Codec], str | None] = {}

    def meet(self, gloo: dist.ProcessGroup, device: torch.device, columns: Collection[int] = ()):
        """Check that all ranks have the same policy, and open transports; before the first exchange, on all ranks.

        Args:
            gloo: the same ranks, over gloo.
            device: holds the tensors.
            columns: numbers of values that a row may have, if the engine knows them already.

        Raises:
            ValueError: a codec cannot encode such rows.
            TimedOut: a rank did not come; most likely it has no policy.
            RanksDisagree: ranks have different policies.
        """
        hops = self.policy.hops
        for codec in map(hops.codec, KINDS):
            for cols in columns:
                codec.check(cols)
        mine = f'dispatch = "{hops.dispatch}", combine = "{hops.combine}", min_bytes = {self.policy.min_bytes}'
        same_policy(gloo, f'{mine}, algorithm = "{self.policy.algorithm}"', "rank", "the exchange of experts")
        self._group.meet(device)
        for codec in map(hops.codec, KINDS):
            kernels.load(codec, device.type)

    def line(self, device: torch.device) -> str:
        """Say at the start what will be done; after `meet`."""
        hops, meeting = self.policy.hops, self._group.meet(device)
        # As large as a message may be: what is declined then is declined always.
        why = [self._why_declined(1 << 30, hops.codec(kind), device) for kind in KINDS if kind in hops.kinds]
        but = f"; but auto sends values as they are: {why[0]}" if any(why) else ""
        ranks = f"{self._group.ranks.world_size} ranks over {meeting.carrier}"
        return f"flashcomm compresses dispatch in {hops.dispatch}, combine in {hops.combine}; {ranks}{but}"

    def dispatch(self, x: torch.Tensor, sizes: Sequence[int], plain: Plain | None = None) -> torch.Tensor:
        """Gather the hidden states of all ranks' tokens.

        Args:
            x: [tokens, H] of this rank.
            sizes: tokens of each rank.
            plain: the engine's own gather of `x`; None if it has none, and ours sends what is not compressed.

        Returns:
            [sum of sizes, H].
        """
        return self._exchange(ALL_GATHER, "dispatch", x, (None, sizes), plain)

    def combine(self, x: torch.Tensor, sizes: Sequence[int], plain: Plain | None = None) -> torch.Tensor:
        """Sum every rank's tokens over all ranks, in fp32 and rank order if compressed.

        Args:
            x: [sum of sizes, H], the sums of this rank's experts.
            sizes, plain: as for `dispatch`.

        Returns:
            [tokens, H] of this rank.
        """
        return self._exchange(REDUCE_SCATTER, "combine", x, (sizes, None), plain)

    def routing(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Gather what is dispatched beside hidden states, for an engine that cannot; arguments as for `dispatch`."""
        return self._run(ALL_GATHER, x, "none", (None, sizes), ROUTING)

    def _exchange(self, verb: Verb, kind: str, x: torch.Tensor, splits: Splits, plain: Plain | None) -> torch.Tensor:
        choice = self._choose(kind, x, splits[0] or splits[1] or ())
        if choice.reason is None:
            return self._run(verb, x, choice.codec, splits)
        if plain is None:
            return self._run(verb, x, "none", splits, choice.reason)
        record_plain(kind, choice.reason)
        return plain(x)

    def _run(
        self, verb: Verb, x: torch.Tensor, codec: "Codec | str", splits: Splits, because: str | None = None
    ) -> torch.Tensor:
        try:
            result = start(verb, x, codec, self.group, splits=splits, because=because)
        except Exception as error:
            worker_metrics.count_error(error)
            raise
        assert not isinstance(result, Work)
        return result

    def _choose(self, kind: str, x: torch.Tensor, sizes: Sequence[int]) -> Choice:
        row_bytes = x.shape[1:].numel() * x.element_size()
        choice = self.policy.choose_hop(kind, max(sizes) * row_bytes, x.dtype)
        if choice.reason:
            return choice
        if x.dim() != 2:
            return choice.declined(f"{x.dim()} dimensions")
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return choice.declined("captured in a CUDA graph")
        reason = self._why_declined(sum(sizes) * row_bytes, choice.codec, x.device)
        return choice.declined(reason) if reason else choice

    def _why_declined(self, total_bytes: int, codec: Codec, device: torch.device) -> str | None:
        """The reason that ``auto`` leaves an exchange of `total_bytes` uncompressed, if it does.

        The planner knows all-reduces; one of half the bytes sends as many.
        """
        if self.policy.algorithm != "auto":
            return None
        key = total_bytes, codec
        if key not in self._declined:
            if len(self._declined) >= _MAX_DECISIONS:
                self._declined.clear()
            plan = planner.choose(total_bytes // 2, self._group.facts_for(device), codec)
            self._declined[key] = plan.reason if plan.declined else None
        return self._declined[key]
