"""Plan messages and predict prompts: arithmetic on facts that are equal on every rank."""

from flashcomm.planner.choose import ALGORITHMS, Facts, Plan, choose, on_level, pieces
from flashcomm.planner.costs import SIZES, Algorithm, Cost, LinkCosts, crossover

__all__ = [
    "ALGORITHMS", "SIZES", "Algorithm", "Cost", "Facts", "LinkCosts", "Plan", "choose", "crossover", "on_level",
    "pieces",
]  # fmt: skip
