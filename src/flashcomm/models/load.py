"""Load a model from a directory, over the ranks of the current process group."""

import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import flashcomm
from flashcomm.integrations.transformers import Compression, tensor_parallel_argument
from flashcomm.models import heads

_PACKAGE = "flashcomm_demo_model"


def _bundled() -> Path:
    """Find the bundled model: in a checkout of the repository, or in the distribution ``flashcomm-demo-model``."""
    checkout = Path(__file__).parents[3] / "packages" / "demo-model" / _PACKAGE
    installed = None if checkout.is_dir() else find_spec(_PACKAGE)
    return Path(installed.origin).parent if installed and installed.origin else checkout


BUNDLED = _bundled()
"""Directory of the bundled model; it does not exist where neither a checkout nor ``flashcomm-demo-model`` is."""


def check_directory(directory: Path, ranks: int):
    """Refuse a model directory that cannot be loaded over `ranks` ranks, before any process is started.

    Raises:
        ValueError: no such model, or `ranks` does not divide its heads; says which numbers are allowed.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"no model in {str(directory)!r}: a Hugging Face model directory has a config.json")
    config = json.loads(path.read_text())
    found = heads.heads_of(config.get("text_config", config))
    if not heads.divides(ranks, *found):
        raise ValueError(f"--tp {ranks} {heads.refusal(*found, repr(str(directory)))}")


def load(directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a local directory, tensor parallel over the default group if there is one."""
    model = load_model(directory, dtype)
    import transformers

    return model, transformers.AutoTokenizer.from_pretrained(directory)


def load_model(directory: Path, dtype: torch.dtype, *, split: bool = True) -> Any:
    """Load the model of a directory that may have no tokenizer; else as `load`.

    Over more ranks than the model has key/value heads, several ranks hold a copy of the same one. With ``split=False``
    every rank holds the whole model.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Where torchao is installed, transformers imports it, and on every rank it tells of libraries for other GPUs.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ranks = dist.get_world_size() if split and dist.is_initialized() else 1
    if ranks < 2:
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    config = transformers.AutoConfig.from_pretrained(directory)
    text: Any = config.get_text_config()
    kv_heads, plan = heads.heads_of(text)[1], text.base_model_tp_plan or {}
    copied = heads.replicated(plan, kv_heads, ranks)
    if copied:
        text.base_model_tp_plan = {name: style for name, style in plan.items() if name not in copied}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, config=config, **tensor_parallel_argument()
    )
    if copied:
        heads.keep_own(model, kv_heads, dist.get_rank(), ranks)
    return model.eval()


def switch(handle: Compression, spec: str, algorithm: str):
    """Make the next forward passes use the codec `spec` with `algorithm`; sums without a codec stay plain."""
    handle.codec = flashcomm.codec(spec)
    handle.algorithm = "plain" if spec == "none" else algorithm
