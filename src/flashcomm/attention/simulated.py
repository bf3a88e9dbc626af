"""Attention over N ranks in one process, bit for bit as the ranks would get it, without a network."""

from collections.abc import Sequence

import torch

from flashcomm import kernels
from flashcomm.attention import arguments
from flashcomm.attention.partial import partial_attention
from flashcomm.attention.rows import Rows, weighted_sum
from flashcomm.codecs import Codec, Plain


def simulate(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    codec: str | Codec = "int8g128",
    *,
    attn_masks: Sequence[torch.Tensor | None] | None = None,
    scale: float | None = None,
    algorithm: str = "auto",
    sharded: bool = False,
) -> torch.Tensor:
    """Compute the result of `scaled_dot_product_attention` if rank r holds ``keys[r]`` and ``values[r]``.

    Args:
        query: ``[B, Hq, L, d]``, the queries of all ranks.
        keys, values: one ``[B, Hk, Lk, d]`` per rank; Lk may differ.
        codec, scale, algorithm, sharded: as for `scaled_dot_product_attention`.
        attn_masks: one per rank, as its ``attn_mask``.

    Returns:
        ``[B, Hq, L, d]``: the result on every rank, or of all ranks in order if `sharded`.

    Raises:
        ValueError: what `scaled_dot_product_attention` refuses, or other numbers of keys, values and masks.

    >>> q, k = torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 3, 8)
    >>> simulate(q, [k, k], [torch.ones_like(k), 3 * torch.ones_like(k)], "int8g128")[0, 0, 0, 0].item()
    2.0
    """
    ranks = len(keys)
    masks = [None] * ranks if attn_masks is None else attn_masks
    if not ranks or len(values) != ranks or len(masks) != ranks:
        raise ValueError(
            f"simulate needs one key, value and mask per rank, not {ranks}, {len(values)} and {len(masks)}"
        )
    codec, two_steps = arguments.check_exchange(codec, algorithm, ranks, sharded)
    for key, value, mask in zip(keys, values, masks, strict=True):
        arguments.check_tensors(query, key, value)
        arguments.check_mask(mask, (*query.shape[:3], key.shape[2]))
    if sharded and query.shape[2] % ranks:
        raise ValueError(f"{query.shape[2]} queries do not split evenly over {ranks} ranks: give a multiple")
    scale = arguments.checked_scale(scale, query.shape[3])
    first, second = codec.formats
    whole = Rows(shape=query.shape)
    if sharded and ranks > 1 and query.numel():
        query = whole.join(_arrived(whole.split(query), second))
    partials = [partial_attention(query, *own, scale) for own in zip(keys, values, masks, strict=True)]
    if ranks == 1 or not query.numel():
        return partials[0][0]
    rows = Rows.of(query.shape, codec, ranks) if two_steps and not sharded else whole
    outs = torch.stack([_arrived(rows.split(out), first) for out, _ in partials])
    merged = weighted_sum(outs, torch.stack([rows.split(lse[..., None]) for _, lse in partials]))
    return rows.join(_arrived(merged, second) if two_steps and not sharded else merged)


def _arrived(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Rows as the receiver decodes them."""
    if isinstance(codec, Plain):
        return rows
    return kernels.decode(kernels.encode(rows, codec), codec, cols=rows.shape[1], dtype=rows.dtype)
