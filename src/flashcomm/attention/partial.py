"""Attention of one rank to its own keys, with the log-sum-exp of the scores, by which ranks can merge their results.

On CPUs it is torch's flash attention, the kernel of `torch.nn.functional.scaled_dot_product_attention`, which keeps the
log-sum-exp to itself; elsewhere plain torch in fp32.

Hazard: torch's kernel divides by zero without keys, and returns 0 as the log-sum-exp of a query that sees none.

Shape legend: B batch, Hq and Hk heads of queries and keys, Lq queries, Lk keys of this rank, d head size.
"""

import torch

_SCORE_BYTES = 64 << 20
"""Most bytes of scores that plain torch holds at a time."""


def partial_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the keys of one rank.

    Args:
        query: ``[B, Hq, Lq, d]``.
        key, value: ``[B, Hk, Lk, d]``; Hk divides Hq, and key head h serves the h-th run of Hq / Hk query heads.
        mask: broadcasts to ``[B, Hq, Lq, Lk]``; bool (True: visible), or added to the scores.
        scale: factor of the scores.

    Returns:
        The output ``[B, Hq, Lq, d]`` in query's dtype, and the log-sum-exp of the scores, fp32 ``[B, Hq, Lq]``.
        A query that sees no key has output 0 and log-sum-exp -inf.

    >>> one = torch.ones(1, 1, 1, 4)
    >>> out, lse = partial_attention(one, torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4), None, 0.5)
    >>> out.tolist(), round(lse.exp().item(), 4)
    ([[[[1.0, 1.0, 1.0, 1.0]]]], 8.0)
    """
    batch, heads, queries, size = query.shape
    key_heads, keys = key.shape[1:3]
    if not keys or not queries:
        return torch.zeros_like(query), query.new_full((batch, heads, queries), -torch.inf, dtype=torch.float32)
    # Heads that share keys become more queries of one head, so that keys need no copies.
    shared = heads // key_heads
    rows = query.reshape(batch, key_heads, shared * queries, size)
    bias = None
    if mask is not None:
        bias = (
            mask
            if mask.dtype != torch.bool
            else torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        )
        bias = bias.float()[(None,) * (4 - mask.dim())]
        per_head = 1 if bias.shape[1] == 1 else key_heads
        bias = bias.expand(bias.shape[0], per_head * shared, queries, keys).reshape(
            -1, per_head, shared * queries, keys
        )
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, key, value, attn_mask=bias, scale=scale
        )
    else:
        out, lse = _plain(rows, key, value, bias, scale)
    if bias is not None:
        hidden = (bias == -torch.inf).all(-1)
        out, lse = out.masked_fill(hidden[..., None], 0), lse.masked_fill(hidden, -torch.inf)
    return out.reshape(query.shape), lse.reshape(batch, heads, queries)


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, for as many queries at a time as `_SCORE_BYTES` allow; heads are equal in number."""
    batch, heads, queries, _ = query.shape
    few = max(1, _SCORE_BYTES // (4 * batch * heads * key.shape[2]))
    key, value, outs, lses = key.float().mT, value.float(), [], []
    for start in range(0, queries, few):
        part = slice(start, start + few)
        scores = scale * (query[:, :, part].float() @ key)
        if bias is not None:
            scores += bias[:, :, part]
        lse = scores.logsumexp(-1)
        outs.append(((scores - lse[..., None]).exp_() @ value).to(query.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)
