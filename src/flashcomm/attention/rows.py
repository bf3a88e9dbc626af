"""Partial results as rows that verbs can send, and their sum.

A row holds whole heads of one token, so each of its values has a weight: the share of its rank's keys in the softmax.

Shape legend: R ranks, B batch, H heads, L queries, d head size, N rows, h heads of a row.
"""

import math
from dataclasses import dataclass

import torch

from flashcomm.codecs import Codec


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """[B, H, L, d] as rows, tokens in the order of L, then B."""

    shape: torch.Size
    """B, H, L, d."""
    pieces: int = 1
    """Rows of a token."""
    padding: int = 0
    """Rows of zeros at the end, for a number that the ranks divide."""

    @staticmethod
    def of(shape: torch.Size, codec: Codec, parts: int) -> "Rows":
        """Cut tokens into rows that `parts` ranks can share out evenly, where that changes no decoded bit.

        >>> from flashcomm.codecs import parse
        >>> Rows.of(torch.Size((1, 32, 1, 128)), parse("int8g128"), 4)
        Rows(shape=torch.Size([1, 32, 1, 128]), pieces=4, padding=0)
        """
        batch, heads, queries, size = shape
        tokens, most = batch * queries, heads * size // math.lcm(codec.unit(heads * size), size)
        fitting = (p for p in range(1, most + 1) if most % p == 0 and tokens * p % parts == 0)
        pieces = next(fitting, most)
        return Rows(shape=shape, pieces=pieces, padding=-tokens * pieces % parts)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, L, n] -> [N, h * n]: outputs or queries with n = d, log-sum-exps with n = 1."""
        batch, heads, queries, size = x.shape
        rows = x.permute(2, 0, 1, 3).reshape(batch * queries * self.pieces, heads // self.pieces * size)
        return torch.cat([rows, rows.new_zeros(self.padding, rows.shape[1])]) if self.padding else rows

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, h * d], or fewer or more tokens where none is cut -> [B, H, tokens / B, d]."""
        batch, heads, _, size = self.shape
        rows = rows[: len(rows) - self.padding].reshape(-1, batch, heads, size)
        return rows.permute(1, 2, 0, 3).contiguous()


def weighted_sum(outs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """Merge normalised outputs [R, N, h * d] by log-sum-exps [R, N, h]: [N, h * d] of outs' dtype, sums in rank order.

        w_r = exp(lse_r - max lse);  sum_r w_r out_r / sum_r w_r

    Rows that no rank saw (lse = -inf everywhere) are 0.

    >>> weighted_sum(torch.tensor([[[1.0]], [[4.0]]]), torch.tensor([[[0.0]], [[math.log(2)]]])).tolist()
    [[3.0]]
    """
    top = lses.amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    # In fp64, so that ranks with other processors round to the same fp32.
    weights = (lses - top).double().exp_().float()
    ranks, count, heads = lses.shape
    total = torch.zeros(count, heads, dtype=torch.float32, device=outs.device)
    merged = torch.zeros(count, heads, outs.shape[2] // heads, dtype=torch.float32, device=outs.device)
    for rank in range(ranks):
        total += weights[rank]
        merged += weights[rank][..., None] * outs[rank].view(merged.shape)
    # The largest weight is 1, so a total under 1 is that of a row without keys.
    merged /= total.clamp_min_(1)[..., None]
    return merged.view(outs.shape[1:]).to(outs.dtype)
