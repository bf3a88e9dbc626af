"""Simulate a transformers model over N tensor-parallel ranks, in one process and bit for bit.

Every module that the model's own plan splits runs once per rank, on the slice of parameters and input that this rank
would hold. A matrix product of another shape may add in another order, so the slices of column-parallel modules are
computed one by one too. Their outputs are joined; outputs of modules that reduce are summed by `flashcomm.simulate`.
A model with fewer key/value heads than ranks runs as in engines, where ranks hold copies of them.
The layers between them treat heads and features one by one, and run once for all ranks.

With pipeline stages, what the last layer of a stage hands on is encoded and decoded once, before the next stage's first
layer. Engines may hand on the output of the last MLP and the residual apart, and encode both.

With ranks that share out the experts, each layer of them becomes three steps, as `flashcomm.accuracy.exchange` says.

The bits equal those of ranks that use as many threads for matrix products as this process does, without gradients.

Source: our own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flashcomm import simulate
from flashcomm.accuracy import exchange, shards
from flashcomm.calibration import Calibration, MovingReach
from flashcomm.codecs import Codec, Features
from flashcomm.integrations import experts
from flashcomm.integrations.patches import Patches
from flashcomm.integrations.sums import apply
from flashcomm.models import heads
from flashcomm.policy import Policy

Observer = Callable[[str, Sequence[torch.Tensor], torch.Tensor], None]


class Simulation:
    """A model that computes like N ranks; made by `simulated`."""

    ranks: int
    policy: Policy
    """Codec of each sum; may be replaced between forward passes."""
    modules: dict[str, int]
    """Number of features of each sum, by the name of the module that is summed; and of each hop, by that of the layer
    that hands it on, or of the experts with the kind of the hop."""
    hops: Mapping[str, str]
    """Kind of each hop, a field of `flashcomm.policy.Hops`, by its name in `modules`."""
    plain: Counter[str]
    """Number of sums and hops that stayed plain, by the policy's reason."""
    observe: Observer | None
    """Called after each sum with the module's name, the ranks' terms and the sum; a hop has one term."""

    def __init__(
        self,
        model: Any,
        ranks: int,
        policy: Policy,
        *,
        stages: int = 1,
        expert_ranks: int = 1,
        hosts: int = 0,
        calibration: Calibration | None = None,
    ):
        self.ranks, self.policy, self.hosts, self.calibration = ranks, policy, hosts, calibration
        self.modules, self.plain, self.observe = {}, Counter(), None
        self._dtype = model.dtype
        self._patches = Patches("flashcomm.accuracy.simulated")
        planned = list(shards.planned(model)) if ranks > 1 or stages == expert_ranks == 1 else []
        shards.check(model, ranks, [(name, style) for name, _, style, _ in planned], stages, expert_ranks)
        self._kv_heads = heads.heads_of(model.config.get_text_config())[1]
        self._copied = heads.replicated({name: style for name, _, style, _ in planned}, self._kv_heads, ranks)
        for name, module, style, parameters in planned:
            if style in (*shards.LINEAR, *shards.EMBEDDING, *shards.EXPERTS):
                hidden = model.config.get_text_config().hidden_size
                self.modules[name] = getattr(module, "out_features", getattr(module, "embedding_dim", hidden))
            if style not in shards.WHOLE:
                self._replace(name, module, style, parameters)
        boundaries = dict(shards.hop_layers(model, stages)) if stages > 1 else {}
        self.hops = dict.fromkeys(boundaries, "pp")
        for name, receiver in boundaries.items():
            self.modules[name] = model.config.get_text_config().hidden_size
            self._receive(name, receiver)
        for name, module, cut in list(shards.expert_modules(model, expert_ranks)) if expert_ranks > 1 else ():
            for kind in experts.KINDS:
                self.hops[f"{name}.{kind}"] = kind
                self.modules[f"{name}.{kind}"] = model.config.get_text_config().hidden_size
            self._exchange(name, module, cut, expert_ranks)

    def undo(self):
        """Restore the model. Harmless when repeated."""
        self._patches.undo()

    def bits_per_value(self, policy: Policy) -> float:
        """Bits on the wire per value, mean over all sums and hops of a token."""
        bits = (w * self._codec(policy, name).bits_per_value(w, self._dtype) for name, w in self.modules.items())
        return sum(bits) / sum(self.modules.values())

    def _codec(self, policy: Policy, name: str) -> Codec:
        return policy.hops.codec(self.hops[name]) if name in self.hops else policy.codec_for(name)

    def compressed(self, name: str, parts: Sequence[torch.Tensor], codec: Codec, algorithm: str) -> torch.Tensor:
        """Sum the ranks' terms of the module `name` in `codec`, as with ``batch_invariant=True``."""
        if self.calibration is not None:
            codec = self.calibration.bind(codec, name, rank=0, ranks=self.ranks)
        # Batch-invariant ranks choose the same: the algorithm that sends the fewest bytes.
        return simulate.all_reduce(parts, codec, algorithm, hosts=self.hosts, batch_invariant=True)

    def _replace(self, name: str, module: nn.Module, style: str, parameters: Mapping[str, str]):
        forward = module.forward

        # Ranks with a copy of the same key/value head compute the same, so once for each head is enough.
        ranks = self._kv_heads if name in self._copied else self.ranks

        def joined(*args: Any, **kwargs: Any) -> torch.Tensor:
            outputs = self._each_rank(module, parameters, lambda rank: forward(*args, **kwargs), ranks)
            parts = [output.chunk(2 if style == "packed_colwise" else 1, -1) for output in outputs]
            return torch.cat([piece for same in zip(*parts, strict=True) for piece in same], -1)

        def linear(x: torch.Tensor) -> torch.Tensor:
            parts = self._each_rank(module, parameters, lambda rank: forward(shards.stripe(x, -1, rank, self.ranks)))
            total, bias = self._sum(name, parts), module._parameters.get("bias")
            return total if bias is None else total + bias

        def experts(*args: Any, **kwargs: Any) -> torch.Tensor:
            return self._sum(name, self._each_rank(module, parameters, lambda rank: forward(*args, **kwargs)))

        def embedding(ids: torch.Tensor) -> torch.Tensor:
            stripe = -(-module.get_parameter("weight").shape[0] // self.ranks)
            found, owner = forward(ids), (ids // stripe).unsqueeze(-1)
            return self._sum(name, [found.masked_fill(owner != rank, 0) for rank in range(self.ranks)])

        kinds = {**dict.fromkeys(shards.JOINED, joined), **dict.fromkeys(shards.LINEAR, linear)}
        kinds |= {**dict.fromkeys(shards.EXPERTS, experts), **dict.fromkeys(shards.EMBEDDING, embedding)}
        self._patches.replace(module, "forward", kinds[style])

    def _receive(self, name: str, layer: nn.Module):
        """Make the first layer of a stage see what it decodes from the hop that the layer `name` hands on."""
        forward = layer.forward

        def received(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(self._hop(name, hidden_states), *args, **kwargs)

        self._patches.replace(layer, "forward", received)

    def _exchange(self, name: str, module: nn.Module, cut: Sequence[str], ranks: int):
        """Make the experts of a layer see what their ranks decode, and return what the tokens' ranks add up."""
        forward = module.forward

        def exchanged(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
            arrived = self._hop(f"{name}.dispatch", hidden_states)
            parts = exchange.of_each_rank(module, cut, ranks, forward, arrived, top_k_index, top_k_weights)
            return self._hop(f"{name}.combine", *parts)

        self._patches.replace(module, "forward", exchanged)

    def _hop(self, name: str, *parts: torch.Tensor) -> torch.Tensor:
        """Encode and decode one tensor, or the terms of a sum; return what arrives."""
        x = parts[0]
        choice = self.policy.choose_hop(self.hops[name], x.numel() * x.element_size(), x.dtype)
        found = apply(
            choice,
            compressed=lambda: exchange.decoded(parts, choice.codec),
            plain=lambda: ring_sum(parts) if len(parts) > 1 else x,
            count=self._count,
        )
        if self.observe:
            self.observe(name, parts, found)
        return found

    def _count(self, reason: str):
        self.plain.update([reason])

    def _each_rank(
        self, module: nn.Module, styles: Mapping[str, str], call: Callable[[int], torch.Tensor], ranks: int = 0
    ) -> list[torch.Tensor]:
        """Run ``call(rank)`` for each of `ranks`, or of all, while the module holds that rank's parameters."""
        ranks = ranks or self.ranks
        whole: dict[str, Any] = {name: module._parameters[name] for name in styles}
        try:
            outputs = []
            for rank in range(ranks):
                held: Any = {n: shards.parameter(n, p, styles[n], rank, ranks) for n, p in whole.items()}
                module._parameters.update(held)
                outputs.append(call(rank))
            return outputs
        finally:
            module._parameters.update(whole)

    def _sum(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        choice = self.policy.choose(parts[0].numel() * parts[0].element_size(), parts[0].dtype, name)

        def compressed() -> torch.Tensor:
            return self.compressed(name, parts, choice.codec, choice.algorithm)

        total = apply(choice, compressed=compressed, plain=lambda: ring_sum(parts), count=self._count)
        if self.observe:
            self.observe(name, parts, total)
        return total


@contextmanager
def simulated(
    model: Any,
    ranks: int,
    policy: Policy | None = None,
    *,
    stages: int = 1,
    expert_ranks: int = 1,
    hosts: int = 0,
    calibration: Calibration | None = None,
) -> Iterator[Simulation]:
    """Make `model` compute like `ranks` tensor-parallel ranks, for the length of a ``with`` block.

    Args:
        model: a transformers model in one process, with a tensor-parallel plan in its configuration.
        ranks: number of ranks to simulate, in each pipeline stage; 1 only with several stages or `expert_ranks`.
        policy: codec of each sum, and algorithm; None for plain. ``none`` and messages under ``min_bytes`` are summed
            by a ring in the dtype of the model; all others are compressed, as with ``batch_invariant=True``.
        stages: number of pipeline stages, as `flashcomm.planner.stages` cuts them; the policy's codec for hops counts.
        expert_ranks: number of ranks that share out the experts, and hold the rest of the model whole; the policy's
            codecs for dispatch and combine count.
        hosts: number of hosts, with equally many ranks, for the algorithm ``hierarchical``.
        calibration: for codecs that need one, made with the same number of ranks.

    Yields:
        A `Simulation`.

    Raises:
        ValueError: no plan, a model that is parallel already, or heads or experts that the ranks do not divide.
        NotImplementedError: the plan splits a module in a way that is not simulated.

    Example::

        with simulated(model, 8, Policy(codec="int4g128", algorithm="one_step")):
            logits = model(input_ids).logits
    """
    simulation = Simulation(
        model,
        ranks,
        policy or Policy(codec="none"),
        stages=stages,
        expert_ranks=expert_ranks,
        hosts=hosts,
        calibration=calibration,
    )
    try:
        yield simulation
    finally:
        simulation.undo()


@torch.inference_mode()
def calibrate(model: Any, ranks: int, windows: Iterable[torch.Tensor], *, gamma: float = 0.01) -> Calibration:
    """Calibrate like `flashcomm.integrations.transformers.calibrate` on `ranks` ranks.

    Args:
        model, ranks: see `simulated`.
        windows: token ids, each [tokens].
        gamma: weight of a new window in the moving averages.
    """
    seen: dict[str, list[MovingReach]] = {}

    def observe(name: str, parts: Sequence[torch.Tensor], total: torch.Tensor):
        averages = seen.setdefault(name, [MovingReach(gamma) for _ in range(ranks + 1)])
        for average, x in zip(averages, (*parts, total), strict=True):
            average.add(x.reshape(-1, x.shape[-1]))

    with simulated(model, ranks) as simulation:
        simulation.observe = observe
        for window in windows:
            model(window[None].to(model.device), use_cache=False)
    features = {name: Features(torch.stack([a.result() for a in averages])) for name, averages in seen.items()}
    return Calibration(features, "a simulation")


def ring_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum all parts like a ring all-reduce: in stripes, each begun by another rank, rounded after each addition.

    The bits equal gloo's if the number of ranks divides the number of values; otherwise its stripes end elsewhere.

    Args:
        parts: one tensor per rank, all of one shape and dtype.

    Returns:
        Tensor of that shape and dtype.

    >>> ring_sum([torch.tensor([256.0, 1.0]).bfloat16(), torch.tensor([1.0, 1.0]).bfloat16()]).tolist()
    [256.0, 2.0]
    """
    ranks = len(parts)
    totals = []
    for owner, stripe in enumerate(zip(*(part.reshape(-1).tensor_split(ranks) for part in parts), strict=True)):
        # Backwards from the rank before the owner, as in gloo: the owner adds last and holds the sum.
        total = stripe[owner - 1]
        for step in range(2, ranks + 1):
            total = total + stripe[owner - step]
        totals.append(total)
    return torch.cat(totals).view(parts[0].shape)
