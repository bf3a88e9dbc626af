"""Advise on a model and a machine that are given by name or by file, and write the advice as a policy.

The arithmetic is `flashcomm.planner.prefill`; nothing is started and no model is loaded.

Source: our own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashcomm.codecs import parse
from flashcomm.planner import hardware, layouts, placement, prefill, shapes
from flashcomm.planner.costs import extra_s
from flashcomm.planner.hardware import Cluster
from flashcomm.planner.layouts import LayoutPrediction, advise_layout
from flashcomm.planner.placement import Placement
from flashcomm.planner.prefill import Advice, Prediction
from flashcomm.planner.shapes import Shape
from flashcomm.policy import Policy

ENGINES = ("transformers", "vllm")
RATES = ("100mbit", "200mbit", "500mbit", "1gbit", "2gbit", "5gbit", "10gbit", "25gbit", "50gbit", "100gbit")
"""Rates between hosts at which formats with slow kernels are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A question to the planner and its answer."""

    shape: Shape
    cluster: Cluster
    tokens: int
    """Tokens per prompt."""
    rows: int
    """Prompts in the batch."""
    predictions: tuple[Prediction, ...]
    """One per codec, plain first."""
    advice: Advice
    layouts: tuple[LayoutPrediction, ...]
    """Ways to put the model on the ranks, in each codec that layouts are compared in."""
    limits: tuple[str, ...] = ()
    """Sentences about the rates up to which formats with slow kernels are worth their time."""

    def as_dict(self) -> dict:
        """The question, the figures and the advice, for JSON."""
        ranks = {"ranks": self.cluster.group.ranks, "hosts": self.cluster.group.hosts}
        return {
            "model": self.shape.name,
            "machine": self.cluster.name,
            **ranks,
            "prompt": self.tokens,
            "batch": self.rows,
            "facts": [*self.cluster.facts, *self.notes],
            "rows": [one.as_dict() for one in self.predictions],
            "advice": self.advice.as_dict(),
            "layouts": [one.as_dict() for one in self.layouts],
            "layout_advice": list(advise_layout(self.layouts)),
        }

    @property
    def notes(self) -> list[str]:
        """Sentences about what the figures leave out."""
        ranks, heads = self.cluster.group.ranks, self.shape.heads
        divided = [] if heads % ranks == 0 else [f"{heads} heads do not divide by {ranks}: as if they did"]
        return [*divided, *self.limits]


def plan(
    model: str,
    machine: str,
    *,
    ranks: int | None = None,
    tokens: int = 2048,
    rows: int = 1,
    codecs: Sequence[str] | None = None,
    ranks_per_host: int | None = None,
    rate: str | None = None,
    link: str | None = None,
) -> Planned:
    """Predict the first token's time in each codec, and advise.

    Args:
        model: name, folder or file, see `flashcomm.planner.shapes.load`.
        machine: a name of `flashcomm.planner.hardware.ACCELERATORS`, or a file of ``flashcomm tune --save``.
        ranks: 2 or more; 4 if not given, or those of the file.
        tokens: tokens per prompt.
        rows: prompts in the batch.
        codecs: codecs to compare with plain; those with kernels on the machine's devices if not given.
        ranks_per_host, rate, link: see `flashcomm.planner.hardware.cluster`; not with a file.

    Raises:
        ValueError: an argument is not allowed; names the allowed ones.
    """
    shape = shapes.load(model)
    for name, given in (("prompt", tokens), ("batch", rows)):
        if given < 1:
            raise ValueError(f"{name} {given}: give 1 or more")
    options = {"--ranks-per-host": ranks_per_host, "--rate": rate, "--link": link}
    cluster = _cluster(machine, ranks, options)
    codecs = codecs or (prefill.CPU_CODECS if cluster.group.connected else prefill.CODECS)
    for spec in codecs:
        if parse(spec).unbound:
            raise ValueError(f"{spec} needs a calibration of a model: plan with its base, {parse(spec).base}")  # pyright: ignore[reportAttributeAccessIssue]
    predictions = tuple(prefill.compare(shape, cluster, codecs, tokens=tokens, rows=rows))
    limits = []
    if cluster.group.hosts > 1 and Path(machine).suffix != ".json":
        at = [
            hardware.cluster(machine, cluster.group.ranks, ranks_per_host=ranks_per_host, rate=one, link=link)
            for one in RATES
        ]
        limits = [_limit(shape, at, spec, codecs, tokens, rows) for spec in codecs if extra_s(parse(spec), 1)]
    layout_codecs = layouts.CODECS if cluster.group.connected else layouts.GPU_CODECS
    placed = _placement(machine, cluster, options)
    return Planned(
        layouts=tuple(layouts.compare_layouts(shape, placed, layout_codecs, tokens=tokens, rows=rows)),
        limits=tuple(limits), shape=shape, cluster=cluster, tokens=tokens, rows=rows, predictions=predictions,
        advice=prefill.advise(predictions),
    )  # fmt: skip


def _limit(shape: Shape, clusters: Sequence[Cluster], slow: str, codecs: Sequence[str], tokens: int, rows: int) -> str:
    """Say up to which of `RATES` a format with slow kernels is faster than plain, and than its nearest fast format."""
    bits = {spec: parse(spec).bits_per_value(4096) for spec in codecs if not extra_s(parse(spec), 1)}
    more = [spec for spec in bits if spec != "none" and bits[spec] > parse(slow).bits_per_value(4096)]

    def until(other: str) -> str:
        time = lambda spec, one: prefill.predict(shape, one, spec, tokens=tokens, rows=rows).ttft_s  # noqa: E731
        wins = [rate for rate, one in zip(RATES, clusters, strict=True) if time(slow, one) < time(other, one)]
        return f"than {'plain' if other == 'none' else other} up to {wins[-1]}" if wins else f"never than {other}"

    others = ["none", *([min(more, key=lambda spec: bits[spec])] if more else [])]
    return f"{slow} has slow kernels: between hosts it is faster {', '.join(map(until, others))}"


def _cluster(machine: str, ranks: int | None, options: dict[str, Any]) -> Cluster:
    if Path(machine).suffix != ".json":
        per_host, rate, link = options.values()
        return hardware.cluster(machine, ranks or 4, ranks_per_host=per_host, rate=rate, link=link)
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{given[0]} with {machine}, which was measured on links of its own: leave it out")
    try:
        cluster = Cluster.from_dict(json.loads(Path(machine).read_text()), machine)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {machine!r}: {error}. `flashcomm tune --save {machine}` makes it") from None
    if ranks not in (None, cluster.group.ranks):
        raise ValueError(
            f"--tp {ranks} with {machine}, which was measured on {cluster.group.ranks} ranks: leave it out"
        )
    return cluster


def _placement(machine: str, cluster: Cluster, options: dict[str, Any]) -> Placement:
    if Path(machine).suffix == ".json":
        return placement.measured(cluster)
    per_host, rate, link = options.values()
    return placement.named(machine, cluster.group.ranks, ranks_per_host=per_host, rate=rate, link=link)


def overlap_in(engine: str, planned: Planned) -> tuple[str, list[str]]:
    """Value of a policy's key ``overlap`` for an engine, and sentences that say why.

    Args:
        engine: one of `ENGINES`.
        planned: from `plan`.

    Raises:
        ValueError: an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine}: use {' or '.join(ENGINES)}")
    if len(planned.advice.parts) == 1 or engine == "transformers":
        return "off", []
    group = planned.cluster.group
    if not (group.connected or group.shared):
        return "off", [
            "vllm: GPUs run its V2 model runner, which cannot run steps in parts; with VLLM_USE_V2_MODEL_RUNNER=0 it "
            "can be tried, but no GPU has run this"
        ]
    if group.hosts == 1 and planned.advice.codec == "none":
        return "off", ["vllm: its sums over one host's shared memory take the cores, so nothing computes meanwhile"]
    return "auto", [
        'vllm: FLASHCOMM_OVERLAP=auto, or overlap = "auto" in the policy; each step of up to '
        "--max-num-batched-tokens is cut by times measured in the server"
    ]


def policy_of(planned: Planned, overlap: str = "off") -> tuple[Policy, list[str]]:
    """Make the policy that follows the advice, with a value for ``overlap``, and comments with the evidence."""
    advice, plain = planned.advice, planned.predictions[0]
    policy = Policy(codec=advice.codec, min_bytes=advice.min_bytes, overlap=overlap)
    prompts = f"{planned.rows} x {planned.tokens} tokens"
    comments = [
        f"flashcomm plan: {planned.shape.name}, {planned.cluster.name}, {prompts}; predicted, not measured",
        f"first token: plain {1e3 * plain.ttft_s:.4g} ms, as below {1e3 * plain.ttft_s / advice.speedup:.4g} ms",
        *advice.reasons,
        *planned.cluster.facts,
        *planned.notes,
    ]
    return policy, comments
