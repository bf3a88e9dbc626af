"""Find the cheapest codec for each sum of a model, so that all together stay within a budget of KL.

The KL of every codec at every sum is predicted from gradients and errors (`sensitivity`), which takes a few passes
however many codecs there are. Such costs nearly add up. Measuring a choice on other text tells how nearly, and the next
choice uses it.

Source: our own; the choice is the multiple-choice knapsack problem, solved by dynamic programming.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashcomm.accuracy.measuring import measure
from flashcomm.accuracy.metrics import FLOOR, AccuracyRow, summarise
from flashcomm.accuracy.sensitivity import predict
from flashcomm.accuracy.simulated import simulated
from flashcomm.codecs import parse
from flashcomm.policy import Policy, Rule

ROUNDS = 5
"""Largest number of single codecs, and of choices, that are measured."""
USUAL = 6
"""Number of policies, the floor among them, that the time left is estimated by; most runs measure four to six."""
CLOSE, AIM = 0.97, 0.985
"""Shares of the budget: a choice that uses the first is close enough, and choices aim at the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The result of `tune`."""

    policy: Policy
    row: AccuracyRow
    """The policy's figures on the windows for verification."""
    uniform: tuple[AccuracyRow, ...]
    """Figures of the candidates that were measured for all sums, then of the floor, on the same windows."""
    best_uniform: AccuracyRow
    """The row with the fewest bits among those that meet the budget."""
    costs: dict[str, dict[str, float]]
    """KL that each codec is predicted to add, by module and codec; the choice was made from it."""
    choice: dict[str, str]
    """Codec by module."""

    @property
    def saved(self) -> float:
        """Share of the best uniform codec's bits that the policy saves."""
        return 1 - self.row.bits_per_value / self.best_uniform.bits_per_value


class _Found(NamedTuple):
    """A choice that was measured."""

    policy: Policy
    row: AccuracyRow
    codecs: list[str]
    """Codec of each module."""


def tune(
    model: Any,
    ranks: int,
    budget: float,
    explored: Sequence[torch.Tensor],
    verified: Sequence[torch.Tensor],
    candidates: Sequence[str],
    *,
    algorithm: str = "auto",
    seed: int = 0,
    folder: Path | None = None,
    step: Callable[[str, int], Callable[[], object]] = lambda name, total: lambda: None,
    **options: Any,
) -> Tuned:
    """Find the policy with the fewest bits that keeps the upper end of its KL's 95 % interval within `budget`.

    Args:
        model, ranks: see `simulated`.
        budget: KL(plain || compressed) in nats.
        explored: windows of token ids to predict the cost of each codec at each sum on.
        verified: other windows, to measure whole policies on.
        candidates: codecs to choose from.
        algorithm: algorithm of all sums.
        seed: random seed of the bootstrap and of the labels of `predict`.
        folder: keeps figures, see `by_window`.
        step: shows progress, see `flashcomm.report.progress`.
        options: passed to `predict` and `measure`: ``hosts``, ``calibration``, ``origin``.

    Raises:
        ValueError: no candidate meets the budget.
    """
    names = list(dict.fromkeys(candidates))
    with simulated(model, ranks) as simulation:
        widths = dict(simulation.modules)
    modules = list(widths)
    costs = predict(
        model, ranks, explored, names, algorithm=algorithm, seed=seed, folder=folder and folder / "costs",
        progress=step("costs of all codecs", len(explored)), **options,
    )  # fmt: skip
    bits = torch.tensor(
        [[w * parse(name).bits_per_value(w, model.dtype) for name in names] for w in widths.values()],
        dtype=torch.float32,
        device="cpu",
    )
    advance = step("whole policies", 2 * USUAL * len(verified))
    numbers = itertools.count()

    def row(policy: Policy, name: str) -> AccuracyRow:
        place = folder and folder / f"{next(numbers)}-{name}"
        found = measure(model, ranks, {name: policy}, verified, folder=place, progress=advance, **options)
        return summarise(found.names, found.bits, found.figures, seed=seed)[1]

    def search(costs: torch.Tensor, bits: torch.Tensor, ratio: float) -> tuple[dict[tuple[int, ...], _Found], float]:
        """Measure choices until one just meets the budget: what was found, and the last KL by its prediction."""
        found: dict[tuple[int, ...], _Found] = {}
        for _ in range(ROUNDS):
            choice = allocate(costs, bits, (AIM * budget - floor.kl.high) / ratio) or costs.argmin(1).tolist()
            if tuple(choice) in found:
                break
            codecs = [names[c] for c in choice] * (len(modules) // len(choice))
            policy = _policy(modules, codecs, algorithm)
            measured = row(policy, codecs[0] if len(choice) == 1 else "policy")
            found[tuple(choice)] = _Found(policy, measured, codecs)
            predicted = sum(costs[m, c].item() for m, c in enumerate(choice))
            ratio = max(measured.kl.high - floor.kl.high, 1e-9) / max(predicted, 1e-9)
            if CLOSE * budget <= measured.kl.high <= budget:
                break
        return found, ratio

    floor = row(Policy(codec=FLOOR, algorithm=algorithm), FLOOR)
    # One codec for all is a choice for a single sum.
    singles, ratio = search(costs.sum(0, keepdim=True), bits.sum(0, keepdim=True), 1.0)
    meeting = [found for found in singles.values() if found.row.kl.high <= budget]
    if not meeting:
        best = min((found.row for found in singles.values()), key=lambda row: row.kl.high)
        raise ValueError(
            f"no candidate meets a KL of {budget:g}: {best.codec} has up to {best.kl.high:.2e}, and another order of "
            f"additions alone up to {floor.kl.high:.2e}. Give a larger budget, or candidates with more bits"
        )
    uniform = min(meeting, key=lambda found: found.row.bits_per_value)
    choices, _ = search(costs, bits, ratio)
    # The best single codec is returned if no choice is better.
    meeting = [uniform, *(found for found in choices.values() if found.row.kl.high <= budget)]
    best = min(meeting, key=lambda found: found.row.bits_per_value)
    return Tuned(
        policy=best.policy,
        row=best.row,
        uniform=(*(found.row for found in singles.values()), floor),
        best_uniform=uniform.row,
        costs={module: dict(zip(names, costs[m].tolist(), strict=True)) for m, module in enumerate(modules)},
        choice=dict(zip(modules, best.codecs, strict=True)),
    )


def allocate(costs: torch.Tensor, sizes: torch.Tensor, budget: float) -> list[int] | None:
    """Choose one column for each row so that the costs stay within a budget and the sizes add up to the least.

    Args:
        costs: [M, C], 0 or more.
        sizes: [M, C].
        budget: limit of the chosen costs' sum; each cost is rounded up by less than 1 in 10,000 of it.

    Returns:
        The column of each row; None if there is no such choice.

    >>> allocate(torch.tensor([[3.0, 1.0], [9.0, 1.0]]), torch.tensor([[4.0, 8.0], [4.0, 8.0]]), budget=4)
    [0, 1]
    """
    rows, columns = costs.shape
    if budget <= 0:
        return None
    steps = 10_000
    units = (costs.double() / budget * steps).ceil().clamp_max(steps + 1).long()
    # best[k]: the least size of the rows so far that costs k units at most.
    best, picks = torch.zeros(steps + 1, dtype=torch.float64, device="cpu"), []
    for row in range(rows):
        options = torch.full((columns, steps + 1), torch.inf, dtype=torch.float64, device="cpu")
        for column, unit in enumerate(units[row].tolist()):
            options[column, unit:] = best[: max(steps + 1 - unit, 0)] + sizes[row, column]
        best, pick = options.min(0)
        picks.append(pick)
    if best[-1].isinf():
        return None
    left, chosen = steps, []
    for row in reversed(range(rows)):
        chosen.append(int(picks[row][left]))
        left -= int(units[row, chosen[-1]])
    return chosen[::-1]


def document(tuned: Tuned) -> dict:
    """The result for JSON: rows of the policy and of single codecs, and each codec's predicted cost at each sum."""
    names = {row.codec: row for row in (tuned.row, *tuned.uniform)}
    return {
        "saved": tuned.saved,
        "best_uniform": tuned.best_uniform.codec,
        "rows": [row.as_dict() for row in names.values()],
        "sums": [
            {"module": m, "chosen": tuned.choice[m], "kl": {c: float(f"{kl:.3g}") for c, kl in each.items()}}
            for m, each in tuned.costs.items()
        ],
    }


def evidence(tuned: Tuned, facts: Sequence[str]) -> list[str]:
    """Comments of the policy's file: the measurement, its result, and the cost of each choice."""
    row, uniform = tuned.row, tuned.best_uniform
    width = max(map(len, tuned.choice))
    lines = [
        *facts,
        f"measured: KL {row.kl.value:.2e} (95 %: {row.kl.low:.2e} to {row.kl.high:.2e}), perplexity "
        f"{100 * row.perplexity_change.value:+.2f} %, the same first token {100 * row.top1.value:.2f} %",
        f"bits per value: {row.bits_per_value:.3f}, {100 * tuned.saved:.1f} % fewer than {uniform.codec} everywhere "
        f"({uniform.bits_per_value:.3f}), the cheapest single codec that was found within the budget",
        "",
        f"{'KL that the choice is predicted to add, by sum':{width}}  codec",
    ]
    lines += [f"{name:{width}}  {codec:9}  {tuned.costs[name][codec]:.1e}" for name, codec in tuned.choice.items()]
    return [*lines, ""]


def _policy(modules: Sequence[str], codecs: Sequence[str], algorithm: str) -> Policy:
    """Make a policy: the most frequent codec for all sums, and a rule for each module with another one."""
    usual = Counter(codecs).most_common(1)[0][0]
    rules = [Rule(match=name, codec=codec) for name, codec in zip(modules, codecs, strict=True) if codec != usual]
    return Policy(codec=usual, algorithm=algorithm, layers=tuple(rules))
