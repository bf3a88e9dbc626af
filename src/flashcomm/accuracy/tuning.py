"""Find the cheapest codec for each sum of a model, so that all together stay within a budget of KL.

The cost of a codec at one sum is measured alone, with all other sums plain, and counted from the cost of another order
of additions there. Such costs nearly add up. Measuring a choice tells how nearly, and the next choice uses it.

Source: our own; the choice is the multiple-choice knapsack problem, solved by dynamic programming.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashcomm.accuracy.measuring import Measurement, measure
from flashcomm.accuracy.metrics import FLOOR, KL, AccuracyRow, summarise
from flashcomm.accuracy.simulated import simulated
from flashcomm.codecs import parse
from flashcomm.policy import Policy, Rule

ROUNDS = 8
"""Largest number of choices that are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The result of `tune`."""

    policy: Policy
    row: AccuracyRow
    """The policy's figures on the windows for verification."""
    uniform: tuple[AccuracyRow, ...]
    """Figures of each candidate for all sums, then of the floor, on the same windows."""
    best_uniform: AccuracyRow
    """The row with the fewest bits among those that meet the budget."""
    costs: dict[str, dict[str, float]]
    """KL that each codec adds alone, by module and codec; the choice was made from it."""
    choice: dict[str, str]
    """Codec by module."""

    @property
    def saved(self) -> float:
        """Share of the best uniform codec's bits that the policy saves."""
        return 1 - self.row.bits_per_value / self.best_uniform.bits_per_value


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
        explored: windows of token ids to measure each codec at each sum on.
        verified: other windows, to measure whole policies on.
        candidates: codecs to choose from.
        algorithm: algorithm of all sums.
        seed: random seed of the bootstrap.
        folder: keeps figures, see `measure`.
        step: shows progress, see `flashcomm.report.progress`.
        options: passed to `measure`: ``hosts``, ``calibration``, ``origin``.

    Raises:
        ValueError: no candidate meets the budget.
    """
    names = list(candidates)

    def run(windows: Sequence[torch.Tensor], variants: Mapping[str, Policy], name: str) -> Measurement:
        place = folder / name.replace(" ", "-") if folder else None
        advance = step(name, len(windows) * (len(variants) + 1))
        return measure(model, ranks, variants, windows, folder=place, progress=advance, **options)

    def rows(variants: Mapping[str, Policy], name: str) -> list[AccuracyRow]:
        found = run(verified, variants, name)
        return summarise(found.names, found.bits, found.figures, seed=seed)[1:]

    everywhere = {name: Policy(codec=name, algorithm=algorithm) for name in (*names, FLOOR)}
    *uniform, floor = rows(everywhere, "uniform codecs")
    meeting = [row for row in uniform if row.kl.high <= budget]
    if not meeting:
        best = min(uniform, key=lambda row: row.kl.high)
        raise ValueError(
            f"no candidate meets a KL of {budget:g}: {best.codec} has up to {best.kl.high:.2e}, and another order of "
            f"additions alone up to {floor.kl.high:.2e}. Give a larger budget, or candidates with more bits"
        )
    best_uniform = min(meeting, key=lambda row: row.bits_per_value)
    with simulated(model, ranks) as simulation:
        widths = dict(simulation.modules)
    modules = list(widths)
    alone = {
        f"{module} {name}": Policy(codec="none", algorithm=algorithm, layers=(Rule(match=module, codec=name),))
        for module in modules
        for name in (*names, FLOOR)
    }
    kl = run(explored, alone, "one sum at a time").figures[1:, KL].double().mean((1, 2)).view(len(modules), -1)
    costs = (kl[:, :-1] - kl[:, -1:]).clamp_min(0)
    bits = torch.tensor(
        [[w * parse(name).bits_per_value(w, model.dtype) for name in names] for w in widths.values()],
        dtype=torch.float32,
        device="cpu",
    )

    # The best uniform codec is returned if no choice is better.
    chosen = [names.index(best_uniform.codec)] * len(modules)
    policy, row = everywhere[best_uniform.codec], best_uniform
    allowed, tried = budget - floor.kl.high, set()
    for number in range(ROUNDS):
        choice = allocate(costs, bits, allowed)
        if choice is None or tuple(choice) in tried:
            break
        tried.add(tuple(choice))
        candidate = _policy(modules, [names[c] for c in choice], algorithm)
        [found] = rows({"policy": candidate}, f"choice {number + 1}")
        if found.kl.high <= budget and found.bits_per_value < row.bits_per_value:
            policy, row, chosen = candidate, found, choice
        # The budget that this choice would have met exactly, if costs keep this proportion.
        predicted = sum(costs[m, c].item() for m, c in enumerate(choice))
        allowed = (budget - floor.kl.high) * predicted / max(found.kl.high - floor.kl.high, 1e-12)
    return Tuned(
        policy=policy,
        row=row,
        uniform=(*uniform, floor),
        best_uniform=best_uniform,
        costs={module: dict(zip(names, costs[m].tolist(), strict=True)) for m, module in enumerate(modules)},
        choice={module: names[c] for module, c in zip(modules, chosen, strict=True)},
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
    """The result as JSON stores it: the policy's row, those of single codecs, and each codec's cost at each sum."""
    names = {row.codec: row for row in (tuned.row, *tuned.uniform)}
    return {
        "saved": tuned.saved,
        "best_uniform": tuned.best_uniform.codec,
        "rows": [row.as_dict() for row in names.values()],
        "sums": [
            {"module": m, "chosen": tuned.choice[m], "codec": c, "kl": kl}
            for m, each in tuned.costs.items()
            for c, kl in each.items()
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
        f"({uniform.bits_per_value:.3f}), the cheapest single codec that meets the budget",
        "",
        f"{'KL that the choice adds alone, by sum':{width}}  codec",
    ]
    lines += [f"{name:{width}}  {codec:9}  {tuned.costs[name][codec]:.1e}" for name, codec in tuned.choice.items()]
    return [*lines, ""]


def _policy(modules: Sequence[str], codecs: Sequence[str], algorithm: str) -> Policy:
    """Make a policy: the most frequent codec for all sums, and a rule for each module with another one."""
    usual = Counter(codecs).most_common(1)[0][0]
    rules = [Rule(match=name, codec=codec) for name, codec in zip(modules, codecs, strict=True) if codec != usual]
    return Policy(codec=usual, algorithm=algorithm, layers=tuple(rules))
