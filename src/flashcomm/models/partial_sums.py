"""The values that ranks of a trained model send: real partial sums, computed in one process.

A row-parallel layer that is split over R ranks adds R products, each of a slice of the input with one of the weight.
"""

from pathlib import Path

import torch

from flashcomm.models import text
from flashcomm.models.load import BUNDLED, load
from flashcomm.models.windows import windows


@torch.inference_mode()
def partial_sums(directory: Path = BUNDLED, ranks: int = 4, tokens: int = 2048) -> dict[str, torch.Tensor]:
    """Compute the partial sums of every layer's attention and MLP on held-out text.

    Args:
        directory: a Hugging Face Llama.
        ranks: R, a divisor of the layers' inner sizes.
        tokens: T, a multiple of 1,024.

    Returns:
        bf16 [R, T, H] by module name.
    """
    model, tokenizer = load(directory, torch.bfloat16)
    ids = text.token_ids(tokenizer, [text.held_out_text()])
    found: dict[str, list[torch.Tensor]] = {}

    def record(name: str):
        def hook(module, inputs):
            x = inputs[0][0].chunk(ranks, -1)
            weights = module.weight.chunk(ranks, 1)
            products = [part @ weight.T for part, weight in zip(x, weights, strict=True)]
            found.setdefault(name, []).append(torch.stack(products))

        return hook

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(record(name))
    for window in windows(ids, tokens):
        model(window[None], use_cache=False)
    return {name: torch.cat(parts, 1) for name, parts in found.items()}
