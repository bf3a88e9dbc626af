"""What the ranks of the bundled model would send: the real partial sums, in one process.

A row-parallel layer that is split over R ranks adds R products, each of a slice of the input with one of the weight.
"""

from pathlib import Path

import torch

from flashcomm.demo import MODEL, text


@torch.inference_mode()
def partial_sums(directory: Path = MODEL, ranks: int = 4, tokens: int = 2048) -> dict[str, torch.Tensor]:
    """Partial sums of every layer's attention and MLP output on held-out text.

    Args:
        directory: a Hugging Face Llama.
        ranks: R, a divisor of the layers' inner sizes.
        tokens: T, a multiple of 1,024.

    Returns:
        By module name, bf16 [R, T, H].
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor(tokenizer(text.held_out_text(), verbose=False)["input_ids"])
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
    for window in text.windows(ids, tokens):
        model(window[None], use_cache=False)
    return {name: torch.cat(parts, 1) for name, parts in found.items()}
