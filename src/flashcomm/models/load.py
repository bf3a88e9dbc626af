"""Load a model from a directory, over the ranks of the current process group."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import flashcomm
from flashcomm.integrations.transformers import Compression, tensor_parallel_argument

BUNDLED = Path(__file__).parent / "bundled"
"""Directory of the bundled model."""


def check_directory(directory: Path, ranks: int):
    """Refuse a model directory that cannot be loaded over `ranks` ranks, before any process is started.

    Raises:
        ValueError: no such model, or `ranks` does not divide its heads; says which numbers are allowed.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"no model in {str(directory)!r}: a Hugging Face model directory has a config.json")
    config = json.loads(path.read_text())
    config = config.get("text_config", config)
    heads = config.get("num_attention_heads", 0)
    kv_heads = config.get("num_key_value_heads", heads)
    if heads % ranks or kv_heads % ranks:
        fits = [n for n in range(1, heads + 1) if heads % n == 0 and kv_heads % n == 0]
        raise ValueError(
            f"--tp {ranks} does not divide the {heads} attention heads and {kv_heads} key/value heads of "
            f"{str(directory)!r}. Allowed: {', '.join(map(str, fits))}"
        )


def load(directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a local directory, tensor parallel over the default group if there is one."""
    model = load_model(directory, dtype)
    import transformers

    return model, transformers.AutoTokenizer.from_pretrained(directory)


def load_model(directory: Path, dtype: torch.dtype) -> Any:
    """Load the model of a directory that may have no tokenizer; else as `load`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    plan = tensor_parallel_argument() if dist.is_initialized() and dist.get_world_size() > 1 else {}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **plan).eval()


def switch(handle: Compression, spec: str, algorithm: str):
    """Make the next forward passes use the codec `spec` with `algorithm`; sums without a codec stay plain."""
    handle.codec = flashcomm.codec(spec)
    handle.algorithm = "plain" if spec == "none" else algorithm
