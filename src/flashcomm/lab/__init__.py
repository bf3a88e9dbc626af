"""Ranks, and slow links between them, on this machine.

    with Lab(ranks=4, rate="1gbit") as lab:
        lab.run([sys.executable, "train.py"])

`hosts` makes hosts behind slow links, `launch` starts one process per rank, in a lab or without one.
"""

from flashcomm.lab.hosts import Lab, Traffic

__all__ = ["Lab", "Traffic"]
