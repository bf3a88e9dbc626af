"""Attention heads over ranks, with key/value heads replicated where there are fewer of them than ranks.

A rank holds whole heads. If there are fewer key/value heads than ranks, several ranks hold a copy of the same one, and
the heads that attend to it are split between them: Llama-70B, with 8 key/value heads, runs so over 16 ranks. vLLM and
SGLang do this; transformers' plans cut a head in two instead, so the plan's rules of these projections are taken out,
and each rank keeps its head of what it has loaded whole.

Source: our own; the rule is that of vLLM's ``QKVParallelLinear``.
"""

import re
from typing import Any

from torch import nn

_PROJECTION = re.compile(r"\.[kv]_proj$")
# Fused projections, which are not taken apart here.
_FUSED = re.compile(r"\.(qkv_proj|query_key_value)$")


def heads_of(config: Any) -> tuple[int, int]:
    """Attention heads and key/value heads of a model's configuration.

    Args:
        config: a transformers configuration, or its JSON as a dictionary.

    Raises:
        ValueError: layers that differ in it, so that there is no one number.

    >>> heads_of({"num_attention_heads": 8, "num_key_value_heads": 2})
    (8, 2)
    """
    get = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
    heads = get("num_attention_heads") or 0
    kv_heads = get("num_key_value_heads") or heads
    if not (isinstance(heads, int) and isinstance(kv_heads, int)):
        raise ValueError(f"layers with {heads} heads and {kv_heads} key/value heads: only one number for all is known")
    return heads, kv_heads


def divides(ranks: int, heads: int, kv_heads: int) -> bool:
    """Whether every rank can hold whole heads: equally many, or a copy of one key/value head.

    >>> divides(16, 64, 8), divides(4, 8, 1), divides(6, 12, 4)
    (True, True, False)
    """
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def refusal(heads: int, kv_heads: int, of: str) -> str:
    """A sentence on the heads of a model, with the numbers of ranks that are allowed.

    >>> refusal(12, 4, "this model")
    'does not divide the 12 attention heads and 4 key/value heads of this model. Allowed: 1, 2, 4, 12'
    """
    allowed = [n for n in range(1, heads + 1) if divides(n, heads, kv_heads)]
    return (
        f"does not divide the {heads} attention heads and {kv_heads} key/value heads of {of}. "
        f"Allowed: {', '.join(map(str, allowed))}"
    )


def replicated(plan: dict[str, str], kv_heads: int, ranks: int) -> list[str]:
    """Rules of a tensor-parallel plan whose modules make the key/value heads that ranks hold copies of.

    Args:
        plan: styles by name of module.
        kv_heads: key/value heads of the model.
        ranks: number of ranks.

    Raises:
        NotImplementedError: heads that would have to be copied come from a projection that is fused with others.

    >>> replicated({"layers.*.self_attn.k_proj": "colwise", "layers.*.self_attn.q_proj": "colwise"}, 1, 4)
    ['layers.*.self_attn.k_proj']
    """
    # A gathered output is whole on every rank, so that no head is cut.
    cut = [name for name, style in plan.items() if style == "colwise"] if kv_heads < ranks else []
    if fused := [name for name in cut if _FUSED.search(name)]:
        raise NotImplementedError(
            f"{kv_heads} key/value heads over {ranks} ranks: {fused[0]!r} makes them together with other heads, and "
            f"such a projection is not taken apart. Use at most {kv_heads} ranks"
        )
    return [name for name in cut if _PROJECTION.search(name)]


def keep_own(model: nn.Module, kv_heads: int, rank: int, ranks: int):
    """Cut projections that a rank has loaded whole down to its one key/value head, in place.

    Args:
        model: loaded with a plan without the rules of `replicated`.
        kv_heads: key/value heads of the model, a divisor of `ranks`.
        rank, ranks: this rank, and how many there are.
    """
    for attention in model.modules():
        children = [child for name, child in attention.named_children() if _PROJECTION.search(f".{name}")]
        for projection in children:
            assert isinstance(projection, nn.Linear)
            size = projection.out_features // kv_heads
            for name, whole in list(projection.named_parameters(recurse=False)):
                own = whole.detach().narrow(0, rank * kv_heads // ranks * size, size).clone()
                projection.register_parameter(name, nn.Parameter(own, requires_grad=whole.requires_grad))
            projection.out_features = size
        if children:
            # The heads that attend to a key/value head are split between its ranks.
            groups: Any = attention.num_key_value_groups
            attention.num_key_value_groups = groups * kv_heads // ranks
