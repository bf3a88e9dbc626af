"""The modules of a transformers model that ranks and pipeline stages split, and each rank's slice of the parameters.

Source: our own; the styles are those of transformers' tensor-parallel plans.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from flashcomm.models import heads
from flashcomm.planner.stages import layers_of_stages

JOINED = ("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise")
LINEAR = ("rowwise", "rowwise_rep", "rowwise_split_input")
EMBEDDING = ("embedding_rowwise",)
EXPERTS = ("moe_tp_experts",)
"""Styles of transformers' plans, of modules."""
WHOLE = ("replicate", "replicated_with_grad_allreduce", "local_params", "mla_kv_a_proj", "embedding_colwise")
"""Styles that, without gradients, compute the same on a rank as in one process."""


def planned(model: Any) -> Iterator[tuple[str, nn.Module, str, dict[str, str]]]:
    """Yield (name, module, style, styles of its parameters) of every module in the model's plan."""
    plan = getattr(model, "_tp_plan", None) or {}
    styles = {name: plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)) for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        if style := styles[name]:
            parameters = [key for key, _ in module.named_parameters(recurse=False)]
            general = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            yield name, module, style, {key: plan.get(f"{general}.{key}", style) for key in parameters}


def hop_layers(model: Any, stages: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name of the layer that hands on a hop, layer that receives it) of each boundary between stages.

    Raises:
        ValueError: more stages than layers.
        NotImplementedError: a model whose decoder has no list of layers.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise NotImplementedError(f"{type(model).__name__} has no list of layers, which stages would be cut from")
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for start in itertools.accumulate(layers_of_stages(len(layers), stages)[:-1]):
        yield f"{prefix}.{start - 1}", layers[start]


def expert_modules(model: Any, ranks: int) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Yield (name, module, its parameters) of each layer's experts, by the model's expert-parallel plan.

    Args:
        model: a transformers model.
        ranks: number of ranks that share out the experts, which it must divide.

    Raises:
        ValueError: no such plan, or experts that `ranks` does not divide.
        NotImplementedError: experts with a parameter that the plan does not cut by expert.
    """
    plan, found = getattr(model, "_ep_plan", None) or {}, False
    for name, module in model.named_modules():
        general = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        parameters = dict(module.named_parameters(recurse=False))
        cut = [key for key in parameters if plan.get(f"{general}.{key}") == "grouped_gemm"]
        if not cut:
            continue
        found, count = True, parameters[cut[0]].shape[0]
        if len(cut) < len(parameters) or getattr(module, "num_experts", None) != count:
            raise NotImplementedError(f"experts {name!r} have parameters that are not one slice per expert")
        if count % ranks:
            allowed = ", ".join(str(n) for n in range(2, count + 1) if count % n == 0)
            raise ValueError(f"{count} experts do not divide evenly among {ranks} ranks: give one of {allowed}")
        yield name, module, cut
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts with an expert-parallel plan, so no tokens are exchanged: give a "
            "mixture-of-experts model, such as Mixtral, Qwen3-MoE or OLMoE"
        )


def check(model: Any, ranks: int, styles: Sequence[tuple[str, str]], stages: int, expert_ranks: int = 1):
    """Refuse what cannot be simulated; errors as of `flashcomm.accuracy.simulated.simulated`."""
    if getattr(model, "_device_mesh", None) is not None:
        raise ValueError("this model is split over ranks already: load it in one process, without a plan")
    if expert_ranks > 1 and (ranks > 1 or stages > 1):
        raise ValueError(
            "experts are simulated over ranks that hold the rest of the model whole: give ranks=1, stages=1"
        )
    if ranks == 1 and (stages > 1 or expert_ranks > 1):
        return
    if ranks < 2:
        raise ValueError(f"{ranks} rank(s) sum nothing: simulate 2 or more")
    if not styles:
        raise ValueError(f"{type(model).__name__} has no tensor-parallel plan, so there are no sums to simulate")
    known = (*JOINED, *LINEAR, *EMBEDDING, *EXPERTS, *WHOLE)
    for name, style in styles:
        if style not in known:
            raise NotImplementedError(
                f"module {name!r} is split in the style {style!r}. Simulated: {', '.join(known)}. "
                "'flashcomm demo --model' measures any model on real ranks"
            )
    found = heads.heads_of(model.config.get_text_config())
    if not heads.divides(ranks, *found):
        raise ValueError(f"ranks={ranks} {heads.refusal(*found, 'this model')}")


def parameter(name: str, whole: torch.Tensor, style: str, rank: int, ranks: int) -> torch.Tensor | None:
    """The part of a parameter that a rank holds; None for a bias that is added after the sum."""
    packed = 2 if style.startswith("packed_") else 1
    if "rowwise" in style:
        return None if name == "bias" else stripe(whole, -1, rank, ranks, packed)
    if "colwise" in style:
        # The first dimension of a weight, or of each expert's weight, is that of the outputs.
        return stripe(whole, max(whole.dim() - 2, 0), rank, ranks, packed)
    return whole


def stripe(x: torch.Tensor, dim: int, rank: int, ranks: int, packed: int = 1) -> torch.Tensor:
    """A rank's stripe, contiguous; taken from each of `packed` equal parts that follow each other."""
    length = x.shape[dim] // packed
    size = -(-length // ranks)
    start = min(rank * size, length)
    pieces = [part.narrow(dim, start, min(size, length - start)) for part in x.chunk(packed, dim)]
    return pieces[0].contiguous() if packed == 1 else torch.cat(pieces, dim)
