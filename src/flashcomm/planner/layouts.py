"""Compare the ways to put a model on ranks: tensor parallel, pipeline stages, both, or one half for prompts alone.

    TP R            all ranks compute each layer and sum its outputs
    PP R            each rank computes some layers and hands on the hidden states and the residual of all tokens
    TP T x PP S     S stages of T ranks that sum
    TP T + TP T     one half computes prompts and sends keys and values to the other half, which decodes

A batch passes the stages one after the other, so its first token gains nothing from them but fewer bytes. While other
batches wait, each stage works on one of them:

    first token = compute + sums + hops + head        batches/s = 1 / (the busiest stage, or the busiest link)
    first token = compute + sums + head + cache + one decode step        where one half decodes

Source: our own; the layouts are those of vLLM and SGLang, and layers are cut as vLLM cuts them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from flashcomm.codecs import parse
from flashcomm.planner import batches
from flashcomm.planner.hardware import Cluster
from flashcomm.planner.placement import Placement
from flashcomm.planner.prefill import SAFE_CODEC, WORTH, SumCosts, line
from flashcomm.planner.shapes import Shape
from flashcomm.planner.stages import layers_of_stages

CODECS = ("none", "lossless", SAFE_CODEC)
"""Codecs to compare layouts in: two that change nothing, and the one that needs no measurement first."""
GPU_CODECS = ("none", SAFE_CODEC)
"""The same on GPUs, where nothing packs the rows of ``lossless``."""
_EXACT = CODECS[:2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Numbers of ranks and stages."""

    tp: int
    """Tensor-parallel ranks of a stage."""
    pp: int = 1
    """Pipeline stages."""
    apart: bool = False
    """Whether as many ranks again only decode."""

    def __str__(self) -> str:
        if self.apart:
            return f"TP {self.tp} + TP {self.tp}"
        return " x ".join(f"{kind} {count}" for kind, count in (("TP", self.tp), ("PP", self.pp)) if count > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPrediction:
    """Predicted figures of one layout in one codec."""

    layout: str
    codec: str
    compute_s: float
    """Seconds of one batch's products and attention, over all stages."""
    sums_s: float
    """Seconds of one batch's sums, over all stages."""
    sent_s: float
    """Seconds of its hops, or of its cache, with encoding and decoding."""
    ttft_s: float
    """Seconds to the first token of one batch while nothing else runs."""
    batches_s: float
    """Batches per second while others wait."""
    weights: float
    """Share of the model's weights that a rank holds."""

    def as_dict(self) -> dict:
        """Convert to figures by name, times in ms."""
        times = {"compute": self.compute_s, "sums": self.sums_s, "sent": self.sent_s, "ttft": self.ttft_s}
        figures = {f"{name}_ms": 1e3 * seconds for name, seconds in times.items()}
        rest = {"batches_s": self.batches_s, "weights": self.weights}
        return {"layout": self.layout, "codec": self.codec, **figures, **rest}


def layouts_of(ranks: int, shape: Shape) -> list[Layout]:
    """All layouts of `ranks` ranks, the one with the most tensor-parallel ranks first.

    >>> from flashcomm.planner.shapes import SHAPES
    >>> [str(one) for one in layouts_of(4, SHAPES["llama-3-8b"])]
    ['TP 4', 'TP 2 x PP 2', 'PP 4', 'TP 2 + TP 2']
    """
    sizes = [tp for tp in range(ranks, 0, -1) if ranks % tp == 0 and shape.heads % tp == 0]
    found = [Layout(tp=tp, pp=ranks // tp) for tp in sizes if ranks // tp <= shape.layers]
    return [*found, *(Layout(tp=tp, apart=True) for tp in sizes if 2 * tp == ranks)]


def compare_layouts(
    shape: Shape, placement: Placement, codecs: Sequence[str] = CODECS, *, tokens: int, rows: int
) -> list[LayoutPrediction]:
    """Predict every layout whose ranks are known, in every codec.

    Args:
        shape: of the model.
        placement: of the ranks.
        codecs: of sums, hops and cache alike.
        tokens: of each prompt.
        rows: prompts in the batch.

    >>> from flashcomm.planner.placement import named
    >>> from flashcomm.planner.shapes import SHAPES
    >>> two = compare_layouts(SHAPES["llama-3-8b"], named("cpu-1gbe", 2), tokens=1024, rows=1)
    >>> [(one.layout, one.codec) for one in two[:4]]
    [('TP 2', 'none'), ('TP 2', 'lossless'), ('TP 2', 'int8g128'), ('PP 2', 'none')]
    """
    known = [(layout, placement.cluster(layout.tp)) for layout in layouts_of(placement.ranks, shape)]
    return [
        predict_layout(shape, placement, cluster, layout, codec, tokens=tokens, rows=rows)
        for layout, cluster in known
        if cluster is not None
        for codec in codecs
    ]


def predict_layout(
    shape: Shape, placement: Placement, cluster: Cluster, layout: Layout, codec: str, *, tokens: int, rows: int
) -> LayoutPrediction:
    """Predict one layout in one codec; arguments as of `compare_layouts`, and the `cluster` of a stage."""
    tp, batch = layout.tp, rows * tokens
    seen = rows * batches.pairs(tokens, 0, cluster.skips)
    attention, mlp, head = (line(work(tp), cluster) for work in (shape.attention, shape.mlp, shape.head))
    layer_s = attention.seconds(batch, seen) + mlp.seconds(batch)
    look_up_s = cluster.segment_s + batch * 4 * shape.hidden / cluster.bytes_s
    head_s = head.seconds(rows)
    sums = SumCosts(cluster=cluster, codec=parse(codec), token_bytes=2 * shape.hidden)
    sum_s = sums.seconds(batch) if tp > 1 else 0.0
    # Hidden states and residual; or keys and values of all layers.
    values = shape.layers * shape.kv_heads * shape.head_dim if layout.apart else shape.hidden
    edges = [tp] if layout.apart else list(accumulate([tp] * (layout.pp - 1)))
    hops = [placement.link(edge, tp).message(2 * 2 * values * batch, codec, tp) for edge in edges]
    sent_s = sum(hop.seconds for hop in hops)
    compute_s, sums_s = shape.layers * layer_s + 2 * look_up_s, (2 * shape.layers + 1) * sum_s
    stages = [count * (layer_s + 2 * sum_s) for count in layers_of_stages(shape.layers, layout.pp)]
    stages[0] += look_up_s + sum_s
    stages[-1] += look_up_s + head_s
    for stage, hop in enumerate(hops):
        stages[stage] += hop.busy_s
        if not layout.apart:
            stages[stage + 1] += hop.busy_s
    decode_s = shape.layers * (attention.seconds(rows) + mlp.seconds(rows)) + head_s if layout.apart else 0.0
    return LayoutPrediction(
        layout=str(layout),
        codec=codec,
        compute_s=compute_s,
        sums_s=sums_s,
        sent_s=sent_s,
        ttft_s=compute_s + sums_s + sent_s + head_s + decode_s,
        batches_s=1 / max(*stages, *(hop.carried_s for hop in hops)) if hops else 1 / max(stages),
        weights=1 / (tp * layout.pp),
    )


def advise_layout(found: Sequence[LayoutPrediction]) -> tuple[str, ...]:
    """Say which layout to use for a single batch and which while batches wait, a sentence each.

    A codec that changes values is advised only if it is `WORTH` more than what changes none.
    """
    return (
        _advice("first token of a single batch", found, lambda one: 1 / one.ttft_s),
        _advice("batches per second while others wait", found, lambda one: one.batches_s),
    )


def _advice(what: str, found: Sequence[LayoutPrediction], gain: Callable[[LayoutPrediction], float]) -> str:
    plain, exact, best = (
        max((one for one in found if one.codec in codecs), key=gain)
        for codecs in (("none",), _EXACT, {one.codec for one in found})
    )
    exact = exact if gain(exact) >= WORTH * gain(plain) else plain
    best = best if gain(best) >= WORTH * gain(exact) else exact
    chosen = [f"{best.layout} {_named(best.codec)}"]
    if best is not plain:
        chosen.append(f"{gain(best) / gain(plain):.2f}x over {plain.layout} plain")
    if exact not in (best, plain):
        chosen.append(f"without any loss {exact.layout} {_named(exact.codec)}, {gain(exact) / gain(plain):.2f}x")
    return f"{what}: use {'; '.join(chosen)}"


def _named(codec: str) -> str:
    return "plain" if codec == "none" else f"in {codec}"
