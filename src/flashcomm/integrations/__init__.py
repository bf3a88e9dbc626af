"""Hooks into the frameworks that run models. Each is imported on demand; none is needed to use the collectives."""

import importlib


def __getattr__(name: str):
    if name == "transformers":
        return importlib.import_module("flashcomm.integrations.transformers")
    raise AttributeError(f"module 'flashcomm.integrations' has no attribute {name!r}")
