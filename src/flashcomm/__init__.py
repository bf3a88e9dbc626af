"""flashcomm: tensor-parallel LLM inference with activations in 2 to 8 bits on the wire.

    x = flashcomm.all_reduce(x, codec="int8g128", group=tp)

`codec` parses a wire format, `encode` and `decode` apply it, `pack` and `unpack` make bytes of it that describe
themselves, the collectives and messages send it, `simulate` shows in one process what the ranks would get, `stats`
tells what happened. `flashcomm.training` has the collectives with gradients, `flashcomm.integrations` compresses whole
models.
"""

import importlib
from typing import TYPE_CHECKING

from flashcomm import simulate
from flashcomm.codecs import Codec
from flashcomm.codecs import parse as codec
from flashcomm.collectives import (
    Work,
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    irecv,
    isend,
    recv,
    reduce_scatter,
    reset_stats,
    send,
    stats,
)
from flashcomm.integrations.registration import register
from flashcomm.kernels import decode, encode
from flashcomm.packed import pack, unpack

if TYPE_CHECKING:
    from flashcomm.policy import Policy

__version__ = "0.3.0"


_MODULES = (
    *("accuracy", "attention", "bench", "calibration", "demo", "integrations", "kv", "lab", "overlap", "policy"),
    "training",
)


def __getattr__(name: str):
    # Loaded when first named, so that `import flashcomm` stays cheap.
    if name in _MODULES:
        return importlib.import_module(f"flashcomm.{name}")
    if name == "Policy":
        return importlib.import_module("flashcomm.policy").Policy
    raise AttributeError(f"module 'flashcomm' has no attribute {name!r}")


# Here, so that a program needs no more than `import flashcomm` to name the backend.
register()

__all__ = [
    "Codec",
    "Policy",
    "Work",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "codec",
    "decode",
    "encode",
    "irecv",
    "isend",
    "pack",
    "recv",
    "reduce_scatter",
    "reset_stats",
    "send",
    "simulate",
    "stats",
    "unpack",
]
