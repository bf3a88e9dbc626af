"""Predict the KL that each codec adds at each sum of a model, from its errors there and one gradient.

A small error e of a sum changes the predictions of all tokens by a KL of E[(g . e)**2] / 2. There g is the gradient of
the log-probability of labels that are drawn from the predictions themselves, so E[g g'] is the Fisher information.
The errors of neighbouring values are nearly independent: the KL is the sum of g**2 * e**2 / 2. One backward pass gives
g at all sums, and one forward pass shows the values that all codecs are tried on, whatever their number.

Hazard: an estimate for small errors, which a whole policy's measured KL must confirm. The backward pass keeps the
activations of a window.

Source: the second-order expansion of KL, as in "Optimal Brain Surgeon" (Hassibi and Stork, 1993) with the Fisher
information for the Hessian; per codec and sum it is our own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flashcomm.accuracy.measuring import by_window
from flashcomm.accuracy.metrics import FLOOR
from flashcomm.accuracy.simulated import Simulation, simulated
from flashcomm.calibration import Calibration
from flashcomm.codecs import parse


def predict(
    model: Any,
    ranks: int,
    windows: Sequence[torch.Tensor],
    candidates: Sequence[str],
    *,
    algorithm: str = "auto",
    seed: int = 0,
    hosts: int = 0,
    calibration: Calibration | None = None,
    folder: Path | None = None,
    origin: str = "",
    progress: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Predict the KL in nats that each codec adds at each sum, beyond that of another order of additions.

    Args:
        model, ranks, hosts, calibration: see `simulated`.
        windows: token ids, each [T + 1].
        candidates: spellings of C codecs.
        algorithm: algorithm of all sums.
        seed: random seed of the labels.
        folder, origin: see `measure`.
        progress: called after each window.

    Returns:
        fp64 [M, C], 0 or more; M sums in the order of the model.
    """
    facts = [origin, ranks, hosts, calibration and calibration.origin, list(candidates), algorithm, seed]
    generator = torch.Generator()

    def window(ids: torch.Tensor) -> torch.Tensor:
        # The draw is the window's own, so that an interrupted run goes on with the same labels.
        generator.manual_seed(seed)
        with simulated(model, ranks, hosts=hosts, calibration=calibration) as simulation:
            names = list(simulation.modules)
        gradients = _gradients(model, names, ids.to(model.device), generator)
        with simulated(model, ranks, hosts=hosts, calibration=calibration) as simulation:
            return _costs(model, simulation, ids.to(model.device), gradients, candidates, algorithm)

    return torch.stack(by_window(windows, window, folder, facts, 1, progress)).mean(0)


def _gradients(
    model: Any, names: Sequence[str], ids: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Gradient of the drawn labels' log-probability by the sum after each module: [1, T, H] each."""
    errors: dict[str, torch.Tensor] = {}

    def add_error(name: str):
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            errors[name] = torch.zeros_like(output, requires_grad=True)
            return output + errors[name]

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(add_error(name)) for name in names]
    try:
        with torch.enable_grad():
            logits = model(ids[None], use_cache=False).logits[0, :-1].float()
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            return dict(zip(errors, torch.autograd.grad(loss, list(errors.values())), strict=True))
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def _costs(
    model: Any,
    simulation: Simulation,
    ids: torch.Tensor,
    gradients: dict[str, torch.Tensor],
    candidates: Sequence[str],
    algorithm: str,
) -> torch.Tensor:
    """Predicted KL per judged token of each codec at each sum: fp64 [M, C]."""
    codecs = [parse(name) for name in (*candidates, FLOOR)]
    costs: dict[str, torch.Tensor] = {}

    def observe(name: str, parts: Sequence[torch.Tensor], total: torch.Tensor):
        exact = torch.stack([part.float() for part in parts]).sum(0)
        weight = gradients[name].float().square()
        errors = (simulation.compressed(name, parts, codec, algorithm).float() - exact for codec in codecs)
        costs[name] = torch.stack([(weight * error.square()).sum(dtype=torch.float64) for error in errors]).cpu()

    simulation.observe = observe
    model(ids[None], use_cache=False)
    found = torch.stack([costs[name] for name in simulation.modules]) / (2 * (len(ids) - 1))
    return (found[:, :-1] - found[:, -1:]).clamp_min(0)
