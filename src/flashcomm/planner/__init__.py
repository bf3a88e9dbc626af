"""How a message is served: arithmetic on facts that are equal on every rank."""

from flashcomm.planner.choose import ALGORITHMS, Group, Plan, choose, pays_from, pieces
from flashcomm.planner.costs import SIZES, Cost, Machine, Way, crossover

__all__ = [
    "ALGORITHMS",
    "SIZES",
    "Cost",
    "Group",
    "Machine",
    "Plan",
    "Way",
    "choose",
    "crossover",
    "pays_from",
    "pieces",
]
