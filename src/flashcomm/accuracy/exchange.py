"""Simulate the exchange of ranks that share out a model's experts: dispatch, the experts of each rank, combine.

    dispatch   encode the hidden states of each token, and decode them on the ranks that hold its experts
    experts    each rank adds up what its own experts make of a token, weighted, in the dtype of the model
    combine    encode each rank's sum; on the token's rank decode all, and add them in fp32, in the order of ranks

Engines do this in two ways. An all-gather of hidden states and a reduce-scatter of sums is simulated bit for bit: every
token passes through the codec, its own rank's too, and ranks without an expert of a token send zeros. An all-to-all
sends a token once per expert, rounded the same way, and one row back for each expert, which the token's rank weights
afterwards. With as many ranks as experts each sum is one weighted row, so there the two differ by the weight alone,
which formats scale out.

Separate from `simulated`, which says what of a model is replaced.

Source: our own; the two ways are those of vLLM's ``allgather_reducescatter`` and of DeepEP.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flashcomm import kernels, simulate
from flashcomm.codecs import Codec


def of_each_rank(
    module: nn.Module,
    cut: Sequence[str],
    ranks: int,
    forward: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> list[torch.Tensor]:
    """Compute each rank's sum over its own experts.

    Args:
        module: the experts; holds one rank's parameters during each call of `forward`.
        cut: names of its parameters, whose dimension 0 is that of the experts.
        ranks: number of ranks; rank r holds the r-th of equal runs of experts.
        forward: the module's own; leaves out what has the index of an expert too many, as transformers' experts do.
        hidden_states: [tokens, H].
        top_k_index: [tokens, K] numbers of experts.
        top_k_weights: [tokens, K].

    Returns:
        [tokens, H] of every rank.
    """
    whole: dict[str, Any] = {name: module._parameters[name] for name in cut}
    held = {name: getattr(module, name) for name in ("num_experts", "_is_expert_parallel") if hasattr(module, name)}
    count = held["num_experts"] // ranks
    try:
        module.num_experts = count
        if "_is_expert_parallel" in held:
            module._is_expert_parallel = True  # pyright: ignore[reportArgumentType]
        found = []
        for rank in range(ranks):
            module._parameters.update({name: x[rank * count : (rank + 1) * count] for name, x in whole.items()})
            elsewhere = top_k_index // count != rank
            index = torch.where(elsewhere, count, top_k_index % count)
            found.append(forward(hidden_states, index, top_k_weights.masked_fill(elsewhere, 0)))
        return found
    finally:
        module._parameters.update(whole)
        for name, value in held.items():
            setattr(module, name, value)


def decoded(parts: Sequence[torch.Tensor], codec: Codec) -> torch.Tensor:
    """Return what arrives of one tensor, or of the terms of a sum, in `codec`.

    >>> one, two = torch.ones(2, 4), torch.full((2, 4), 2.0)
    >>> from flashcomm.codecs import parse
    >>> decoded([one], parse("int8g128")).unique().tolist(), decoded([one, two], parse("int8g128")).unique().tolist()
    ([1.0], [3.0])
    """
    x = parts[0]
    if len(parts) > 1:
        # A reduce-scatter rounds like an all-reduce in one step: each term once.
        return simulate.all_reduce(parts, codec, "one_step")
    payload = kernels.encode(x.reshape(-1, x.shape[-1]), codec)
    return kernels.decode(payload, codec, cols=x.shape[-1], dtype=x.dtype).view(x.shape)
