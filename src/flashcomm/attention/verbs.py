"""Attention whose keys and values are spread over ranks: each rank its own keys, then one merge by log-sum-exp.

    one_step   all-gather of outputs and log-sum-exps | merge everywhere     one rounding, (R - 1) outputs sent
    two_step   all-to-all of both | merge | all-gather of the merged         two roundings, 2 (R - 1) / R outputs sent
    sharded    all-gather of queries | all-to-all of both | merge            one rounding of each, as many bytes

Outputs travel normalised, in the codec; log-sum-exps, one for d values, in fp32. Weights are applied after decoding and
sum to one, so rounding errors are averaged, not added: |error| <= sum_r w_r step_r / 2, at most half the largest step.
docs/attention.md derives it.

Shape legend: R ranks, B batch, Hq and Hk heads of queries and keys, L queries of all ranks, Lk keys of one, d head
size.

Source: LV-XAttn (arXiv 2502.02406) leaves keys in place and merges by log-sum-exp, hop by hop around a ring; the merge
in two collectives, and its bound, are our own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from flashcomm.attention import arguments
from flashcomm.attention.partial import partial_attention
from flashcomm.attention.rows import Rows, weighted_sum
from flashcomm.codecs import Codec
from flashcomm.collectives import all_gather, all_to_all
from flashcomm.collectives.group import Group, group_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    algorithm: str = "auto",
    sharded: bool = False,
) -> torch.Tensor:
    """Attend to the keys of all ranks, as `torch.nn.functional.scaled_dot_product_attention` would to all in one place.

    Causal attention to a cache whose shares have any order: with ``query_positions`` [L] and this rank's
    ``key_positions`` [Lk], ``attn_mask=key_positions <= query_positions[:, None]``.

    Args:
        query: ``[B, Hq, L, d]`` of bf16, fp16 or fp32, the same on all ranks; if `sharded`, ``[B, Hq, L / R, d]``.
        key, value: this rank's share, ``[B, Hk, Lk, d]`` in query's dtype. Lk may differ between ranks and may be 0. Hk
            divides Hq, and key head h serves the h-th run of Hq / Hk query heads.
        codec: wire format of queries and outputs; of a pair, the first for outputs before the merge, the second for
            queries and merged outputs; ``none`` for uncompressed values.
        group: process group or mesh, as for `flashcomm.all_reduce`.
        attn_mask: broadcasts to ``[B, Hq, L, Lk]``: queries of all ranks, keys of this rank. Bool (True: visible), or
            floating point, added to the scores.
        scale: factor of the scores; None for ``1 / sqrt(d)``.
        algorithm: ``one_step``, ``two_step``, or ``auto``: one step for two ranks, else two.
        sharded: rank r holds the r-th of R equal parts of the queries, and gets the outputs of these.

    Returns:
        Tensor of query's shape and dtype; unless `sharded`, with the same bits on every rank. A query that sees no key
        on any rank gets 0.

    Raises:
        ValueError: a wrong argument; raised before any communication.
        RuntimeError: as for `flashcomm.all_reduce`.
    """
    arguments.check_tensors(query, key, value)
    home = group_of(group)
    ranks = home.ranks.world_size
    codec, two_steps = arguments.check_exchange(codec, algorithm, ranks, sharded)
    scale = arguments.checked_scale(scale, query.shape[3])
    batch, heads, queries, _ = query.shape
    arguments.check_mask(attn_mask, (batch, heads, queries * (ranks if sharded else 1), key.shape[2]))
    # Keys and masks may differ in length, and nothing else.
    _agree(home, "attention", query, codec, two_steps, sharded, f", key_heads={key.shape[1]}, scale={scale!r}")
    if sharded and ranks > 1 and queries:
        rows = Rows(shape=query.shape)
        query = rows.join(_travel(all_gather, rows.split(query), codec.formats[1], group))
    out, lse = partial_attention(query, key, value, attn_mask, scale)
    return _merge(out, lse, codec, group, ranks, two_steps, sharded)


def merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    algorithm: str = "auto",
    sharded: bool = False,
) -> torch.Tensor:
    """Merge what each rank's attention kernel found for all queries among its own keys.

    Args:
        out: ``[B, Hq, L, d]`` of bf16, fp16 or fp32: this rank's normalised output.
        lse: fp32 ``[B, Hq, L]``: natural logarithm of the sum of exponentials of the scaled scores; -inf, not +inf,
            where a query sees no key of this rank, whose output then does not matter.
        codec, group, algorithm: as for `scaled_dot_product_attention`.
        sharded: return the r-th of R equal parts of the queries on rank r.

    Returns:
        ``[B, Hq, L, d]`` in out's dtype, or ``[B, Hq, L / R, d]`` if `sharded`.

    Raises:
        ValueError, RuntimeError: as for `scaled_dot_product_attention`.
    """
    arguments.check_partials(out, lse)
    home = group_of(group)
    ranks = home.ranks.world_size
    codec, two_steps = arguments.check_exchange(codec, algorithm, ranks, sharded)
    if sharded and out.shape[2] % ranks:
        raise ValueError(
            f"{out.shape[2]} queries do not split evenly over {ranks} ranks: pad them, or leave out sharded"
        )
    _agree(home, "merge", out, codec, two_steps, sharded)
    return _merge(out, lse, codec, group, ranks, two_steps, sharded)


def _merge(
    out: torch.Tensor, lse: torch.Tensor, codec: Codec, group: Any, ranks: int, two_steps: bool, sharded: bool
) -> torch.Tensor:
    # What a kernel left where no key is visible must not reach a neighbour's scale.
    out = out.masked_fill((lse == -torch.inf)[..., None], 0)
    if ranks == 1 or not out.numel():
        return out
    first, second = codec.formats
    # Sharded queries belong to their ranks already, and one step sends all rows to all ranks.
    rows = Rows.of(out.shape, codec, ranks) if two_steps and not sharded else Rows(shape=out.shape)
    sent, weights = rows.split(out), rows.split(lse[..., None])
    exchange = all_to_all if two_steps or sharded else all_gather
    outs = _travel(exchange, sent, first, group)
    lses = _travel(exchange, weights, "fp32", group)
    merged = weighted_sum(outs.view(ranks, -1, sent.shape[1]), lses.view(ranks, -1, weights.shape[1]))
    if two_steps and not sharded:
        merged = _travel(all_gather, merged, second, group)
    return rows.join(merged)


def _travel(verb: Callable, rows: torch.Tensor, codec: str | Codec, group: Any) -> torch.Tensor:
    return verb(rows, codec, group)


def _agree(home: Group, name: str, x: torch.Tensor, codec: Codec, two_steps: bool, sharded: bool, more: str = ""):
    """Let all ranks compare what they are about to do, the first time; see `Group.agree`."""
    how = "sharded" if sharded else "two_step" if two_steps else "one_step"
    call = f"op={name}, algorithm={how}, codec={codec}, dtype={str(x.dtype).removeprefix('torch.')}{more}, shape="
    shape = "x".join(map(str, x.shape))
    # On GPUs a comparison waits for the device, so there only the first of all lengths is compared.
    batch, heads, _, size = x.shape
    home.agree(
        call + shape, x.device, known_as=call + (shape if x.device.type == "cpu" else f"{batch}x{heads}x*x{size}")
    )
