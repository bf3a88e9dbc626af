"""Hooks into the frameworks that run models. Each is imported on demand; the collectives need none of them."""

import importlib


def __getattr__(name: str):
    if name in ("dtensor", "lm_eval", "sglang", "torch_backend", "transformers", "vllm"):
        return importlib.import_module(f"flashcomm.integrations.{name}")
    raise AttributeError(f"module 'flashcomm.integrations' has no attribute {name!r}")
