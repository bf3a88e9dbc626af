"""Models with random weights, for measuring times, which do not depend on the weights' values."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-160m": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, intermediate_size=3072,
        vocab_size=32000, max_position_embeddings=4096,
    ),
    "llama-1b": dict(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
        vocab_size=128256, max_position_embeddings=4096, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Configurations of Llamas that can be made without a download, by name."""


@contextmanager
def random_model(config: str, dtype: torch.dtype) -> Iterator[Path]:
    """Make a folder with the model `config` of `CONFIGS`, removed when the ``with`` block ends."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="flashcomm-model-") as folder:
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIGS[config]))
        finally:
            torch.set_default_dtype(default)
        made.save_pretrained(folder)
        del made
        yield Path(folder)
