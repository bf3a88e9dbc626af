"""Exact attention over keys and values that are spread over ranks, for long contexts behind slow links.

    y = flashcomm.attention.scaled_dot_product_attention(query, key, value, "int8g128", group)

Keys and values never move. Each rank attends to its own, and the ranks merge their results by log-sum-exp, so what
travels grows with the number of queries alone. `merge` takes the partial results of any attention kernel, `simulate`
gives the bits of all ranks in one process.
"""

from flashcomm.attention.simulated import simulate
from flashcomm.attention.verbs import merge, scaled_dot_product_attention

__all__ = ["merge", "scaled_dot_product_attention", "simulate"]
