"""A model as transformers loads it over ranks: which ranks, and which of its modules add up over them.

Which those are is read from the loaded model, not from a version:

    5.0 to 5.15   the style is noted on the module, the sum made in its forward hooks
    5.16 and on   the plan is on the model, the module's forward replaced

Wrappers change names: around the whole model (PEFT, DistributedDataParallel, torch.compile) they are looked through,
and inside of it their parts of a name are left out before the plan is asked.

Source: our own; names become entries of a plan as in transformers' ``replace_layer_number_by_wildcard``.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

# Styles of transformers' plans that shard a module but leave no sum to make after it.
_NOT_REDUCING = re.compile(
    "colwise|packed_|local|grouped_gemm|ep_router|megamoe|mla_|moe_identity|replicate|sequence_parallel|embedding_colwise"
)

# What wrappers inside of a model add to names: torch.compile, PEFT, activation checkpoints.
_WRAPPERS = re.compile(
    r"\.(_orig_mod|base_layer|original_module|modules_to_save\.[^.]+|_checkpoint_wrapped_module)(?=\.|$)"
)


def unwrapped(model: Any) -> Any:
    """Find the model that `from_pretrained` returned inside of a wrapper, such as torch.compile's."""
    parts = model.modules() if isinstance(model, torch.nn.Module) else ()
    return next((part for part in parts if vars(part).get("_device_mesh") is not None), model)


def tensor_parallel_group(model: Any) -> dist.ProcessGroup:
    """Find the process group over which a loaded model is tensor parallel.

    Raises:
        ValueError: the model is not tensor parallel, or over one rank only.
    """
    mesh = getattr(model, "_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if mesh is not None and mesh.ndim > 1:
        mesh = mesh["tp"] if "tp" in names else None
    if mesh is None or mesh.size() < 2:
        raise ValueError(
            "this model is not tensor parallel over two or more ranks: start the script with "
            "torchrun --nproc-per-node N, load it with from_pretrained(..., distributed_config=DistributedConfig("
            'tp_size=N)), or tp_plan="auto" before transformers 5.15, and give the object that from_pretrained returned'
        )
    return mesh.get_group()


def cache_name(forward: Callable) -> str:
    """Name of the argument, and of the output, that holds keys and values; "" if there is none.

    It is ``cache`` since transformers 5.24, and ``past_key_values`` before.
    """
    parameters = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), "")


def reducing_modules(model: Any) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Yield (name, module, style) of every module whose output transformers sums over ranks."""
    plan = {**(getattr(model, "_ep_plan", None) or {}), **(getattr(model, "_tp_plan", None) or {})}
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            continue  # Compiled: it has a forward of its own, and the module inside of it comes next.
        style = vars(module).get("_hf_tp_plan")
        if style is None and "forward" in vars(module):
            # In the plan is the name that it had before it was wrapped, with numbers between dots as transformers
            # replaces them: not two in a row.
            style = plan.get(re.sub(r"\.\d+(\.|$)", r".*\1", _WRAPPERS.sub("", name)))
        if style is not None and not _NOT_REDUCING.match(style):
            yield name, module, style


def refuse_lost_weights(modules: Iterable[torch.nn.Module]):
    """Refuse quantised layers that transformers cannot run tensor parallel: of bitsandbytes, and packed GGUF."""
    for module in modules:
        kind, package = type(module).__name__, type(module).__module__
        if package.startswith("bitsandbytes.") and not type(module.weight).__module__.startswith("bitsandbytes."):
            raise ValueError(
                f"bitsandbytes' {kind} cannot run tensor parallel: transformers splits its weight without its "
                "quantisation state, so the model does not run without flashcomm either. Load it with torchao's int8 "
                "weights (TorchAoConfig), or unquantised"
            )
        if package.startswith("transformers.integrations.gguf"):
            raise ValueError(
                f"transformers' {kind} cannot run tensor parallel: it unpacks whole weights and has none of the parts, "
                "so the model does not run without flashcomm either. Unpack the weights as they are loaded "
                "(GgufConfig(dequantize=True))"
            )
