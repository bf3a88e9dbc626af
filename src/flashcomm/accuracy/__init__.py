"""The cost of compression in accuracy, in one process: N ranks are simulated bit for bit and compared with plain.

    with simulated(model, ranks=8, policy=Policy(codec="int4g128")):
        model(input_ids)

`flashcomm accuracy` measures codecs and policies with it, `flashcomm tune-policy` finds the cheapest policy within a
budget.
"""

from flashcomm.accuracy.simulated import Simulation, simulated

__all__ = ["Simulation", "simulated"]
