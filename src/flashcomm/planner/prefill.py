"""Predict how long prompts take on a cluster, in each codec and in parts, and advise what to choose.

    prefill = compute + sums    in one piece;  by `Profile.seconds` in parts, which take turns
    compute = layers x (products / their rate + values / memory's rate + pairs / attention's rate)
    sums    = (2 x layers + 1) x what `planner.choose` takes for a message of tokens x hidden x 2 bytes

Products of few tokens take as long as reading their weights. The first token needs the product with the vocabulary too.

Source: our own; the parts and their turns are ISO's (arXiv 2409.11155).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from flashcomm.codecs import Codec, parse
from flashcomm.planner import overlap
from flashcomm.planner.choose import Facts, Plan, choose
from flashcomm.planner.costs import Algorithm, LinkCosts, extra_s
from flashcomm.planner.hardware import Cluster
from flashcomm.planner.overlap import Line, Profile, Split
from flashcomm.planner.shapes import Shape, Workload
from flashcomm.units import bytes_text

CODECS = ("none", "int8g128", "int6g128", "int5g128", "int4g32", "int4g128")
"""Codecs to compare on GPUs, which have kernels for these."""
CPU_CODECS = ("none", "int8g128", "ec6", "int6g128+hadamard", "int5g128+hadamard", "ec4.25", "int4g128+hadamard")
"""Codecs to compare on CPUs: those that real models want (docs/accuracy.md)."""
SAFE_CODEC = "int8g128"
"""The codec that is advised without a measurement of the model: it cost a real one 0.5 % of perplexity."""
WORTH = 1.05
"""Speedup of the first token from which a codec, or parts, are advised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SumCosts:
    """Predicted times of a model's sums in one codec on a cluster, by tokens."""

    cluster: Cluster
    codec: Codec
    token_bytes: int
    """Message bytes for each token: 2 for each hidden value."""

    def plan(self, tokens: float) -> Plan:
        """Plan one sum of `tokens` tokens."""
        return choose(int(tokens * self.token_bytes), self.cluster.group, self.codec)

    def seconds(self, tokens: float) -> float:
        """Predicted seconds of one sum."""
        return seconds(self.cluster.group, self.plan(tokens), int(tokens * self.token_bytes))

    def busy(self, tokens: float) -> float:
        """Share of a sum's time in which it takes the core from the compute beside it."""
        exact = self.plan(tokens).algorithm == "plain"
        core_s = self.cluster.plain_core if exact else self.cluster.codec_core + extra_s(self.codec, 1)
        return min(1.0, tokens * self.token_bytes * core_s / self.seconds(tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted times of prompts in one codec."""

    codec: str
    algorithm: str
    """Algorithm and pieces of a sum of the whole prompts, such as ``two_step/3``."""
    compute_s: float
    sums_s: float
    """Seconds of all sums, if prompts run in one piece."""
    head_s: float
    """Seconds of the product with the vocabulary."""
    split: Split
    """The fastest parts for the prompts; one part if more are not faster."""
    min_bytes: int | None
    """Message size from which compression is faster than plain; None if it never is."""

    @property
    def prefill_s(self) -> float:
        """Seconds of the prefill in one piece."""
        return self.compute_s + self.sums_s

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token, in one piece."""
        return self.prefill_s + self.head_s

    @property
    def overlapped_s(self) -> float:
        """Seconds to the first token, in the parts of `split`."""
        return (
            self.split.seconds if len(self.split.sizes) > 1 and self.split.seconds else self.prefill_s
        ) + self.head_s

    @property
    def share(self) -> float:
        """Share of the sums in the prefill, in one piece."""
        return self.sums_s / self.prefill_s

    def as_dict(self) -> dict:
        """Convert to figures by name, times in ms."""
        parts = list(self.split.sizes)
        times = {"compute": self.compute_s, "sums": self.sums_s, "prefill": self.prefill_s, "ttft": self.ttft_s}
        times |= {"overlapped_ttft": self.overlapped_s}
        figures = {f"{name}_ms": 1e3 * seconds for name, seconds in times.items()}
        return {
            "codec": self.codec, "algorithm": self.algorithm, **figures, "share": self.share, "parts": parts,
            "min_bytes": self.min_bytes,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Codec and parts to run with, and the reasons."""

    codec: str
    """The codec; ``none`` if compression is not worth it."""
    min_bytes: int
    """Smallest message that is worth the codec."""
    speedup: float
    """Speedup of the first token over plain, both in one piece."""
    parts: tuple[int, ...]
    """Tokens of each part, where prompts can run in parts; one part if they should not."""
    speedup_in_parts: float
    """Speedup of the first token over the uncompressed, unsplit prompt."""
    reasons: tuple[str, ...]
    """The reasons, a sentence each."""

    def as_dict(self) -> dict:
        """The fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def profile(shape: Shape, cluster: Cluster, codec: Codec, tokens: int) -> Profile:
    """Predict the profile of a model on a cluster, for the planner of overlap.

    Args:
        shape: of the model.
        cluster: the ranks.
        codec: of the sums.
        tokens: of the batch; `Profile.busy` is that of its sums.

    Returns:
        A profile whose first segment is the look-up of the tokens and whose last is the norm before the head.
    """
    sums = SumCosts(cluster=cluster, codec=codec, token_bytes=2 * shape.hidden)
    ranks = cluster.group.ranks
    look_up = Line(fixed_s=cluster.segment_s, token_s=4 * shape.hidden / cluster.bytes_s)
    layer = (line(shape.attention(ranks), cluster), line(shape.mlp(ranks), cluster))
    segments = (look_up, *layer, look_up)
    return Profile(
        segments=segments,
        sum=sums,
        layers=shape.layers,
        busy=sums.busy(tokens),
        crowded=cluster.crowded,
        skips=cluster.skips,
    )


def predict(shape: Shape, cluster: Cluster, codec: str, *, tokens: int, rows: int = 1) -> Prediction:
    """Predict the times of prompts in one codec.

    Args:
        shape: of the model.
        cluster: the ranks.
        codec: of the sums; ``none`` for plain.
        tokens: of each prompt.
        rows: prompts in the batch.

    Raises:
        ValueError: an unknown codec.

    >>> from flashcomm.planner.hardware import cluster
    >>> from flashcomm.planner.shapes import SHAPES
    >>> four = cluster("l40", 4)
    >>> plain, few = (predict(SHAPES["llama-3-8b"], four, name, tokens=2048).ttft_s for name in ("none", "int4g128"))
    >>> plain > few
    True
    """
    parsed = parse(codec)
    costs = profile(shape, cluster, parsed, rows * tokens)
    plan = SumCosts(cluster=cluster, codec=parsed, token_bytes=2 * shape.hidden).plan(rows * tokens)
    return Prediction(
        codec=str(parsed),
        algorithm=str(Algorithm(name=plan.algorithm, pieces=plan.pieces)),
        compute_s=costs.compute_s(tokens, rows),
        sums_s=costs.communication_s(tokens, rows),
        head_s=line(shape.head(cluster.group.ranks), cluster).seconds(rows),
        split=overlap.choose(costs, tokens, rows),
        min_bytes=_costs(cluster.group).pays_from(parsed),
    )


def advise(predictions: Sequence[Prediction]) -> Advice:
    """Choose among predictions of the same prompts; the first one must be plain.

    The codec is chosen for prompts in one piece: `SAFE_CODEC` if it is worth it, else the codec with the most bits that
    is worth it, else none.
    """
    plain, *others = predictions
    gain = lambda one: plain.ttft_s / one.ttft_s  # noqa: E731
    worth = [one for one in others if one.min_bytes is not None and gain(one) >= WORTH]
    most_bits = max(worth, key=lambda one: parse(one.codec).bits_per_value(4096), default=plain)
    chosen = next((one for one in worth if one.codec == SAFE_CODEC), most_bits)
    fastest = max(worth, key=gain, default=plain)
    reasons = [
        f"the sums take {plain.share:.0%} of a plain prefill, so however they are sent it gets at most "
        f"{plain.prefill_s / plain.compute_s:.2f}x faster"
    ]
    if chosen is plain:
        best = max(map(gain, others), default=1.0)
        reasons.append(f"no codec makes the first token {WORTH - 1:.0%} faster (the best: {best:.2f}x): leave it plain")
    else:
        reasons.append(f"{chosen.codec} makes the first token {gain(chosen):.2f}x faster")
        if chosen.codec != SAFE_CODEC:
            reasons.append(f"more bits are not worth it: measure with `flashcomm accuracy` what {chosen.codec} costs")
        reasons.append(f"messages under {bytes_text(chosen.min_bytes or 0)} stay plain, as those of most decode steps")
    if gain(fastest) >= WORTH * gain(chosen):
        reasons.append(
            f"{fastest.codec} makes it {gain(fastest):.2f}x faster: measure with `flashcomm accuracy` what that costs"
        )
    split = chosen.split.sizes if chosen.ttft_s >= WORTH * chosen.overlapped_s else (sum(chosen.split.sizes),)
    in_parts = plain.ttft_s / chosen.overlapped_s if len(split) > 1 else gain(chosen)
    reasons.append(
        f"where prompts run in {len(split)} parts that take turns (flashcomm.overlap): {in_parts:.2f}x faster"
        if len(split) > 1
        else f"parts that take turns gain less than {WORTH - 1:.0%} more: run prompts in one piece"
    )
    return Advice(
        codec=chosen.codec,
        min_bytes=chosen.min_bytes or 0,
        speedup=gain(chosen),
        parts=split,
        speedup_in_parts=in_parts,
        reasons=tuple(reasons),
    )


def seconds(group: Facts, plan: Plan, message_bytes: int) -> float:
    """Predict the seconds of a plan that `planner.choose` has made for a group.

    Args:
        group: facts with measured costs.
        plan: for a message of that size.
        message_bytes: on each rank.
    """
    algorithm = None if plan.algorithm == "plain" else Algorithm(name=plan.algorithm, pieces=plan.pieces)
    return _costs(group).seconds(algorithm, plan.codec, message_bytes, exact=plan.declined)


def compare(shape: Shape, cluster: Cluster, codecs: Sequence[str], *, tokens: int, rows: int) -> Iterator[Prediction]:
    """Predict every codec, plain first."""
    for codec in dict.fromkeys(["none", *codecs]):
        yield predict(shape, cluster, codec, tokens=tokens, rows=rows)


def _costs(group: Facts) -> LinkCosts:
    assert group.costs is not None
    return group.costs


@lru_cache(maxsize=256)
def line(work: Workload, cluster: Cluster) -> Line:
    """Predict the seconds of one segment of a layer on a rank of a cluster, by tokens and pairs."""
    return Line(
        fixed_s=cluster.segment_s,
        token_s=work.flops / cluster.flops + work.value_bytes / cluster.bytes_s,
        pair_s=work.pair_flops / cluster.attention_flops,
        least_s=work.weight_bytes / cluster.bytes_s,
    )
