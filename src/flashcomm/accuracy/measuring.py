"""Run a simulated model over windows of text with each policy, and keep the figures window by window.

A window's figures are written when it is done, so an interrupted measurement goes on from there.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from flashcomm.accuracy.metrics import compare
from flashcomm.accuracy.simulated import Simulation, simulated
from flashcomm.calibration import Calibration
from flashcomm.policy import Policy

EVERY = 16
"""Distance of the tokens that are looked at in depth: one in 16."""
_RUN = "run.json"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Figures of `measure`. C variants, plain first; W windows of T judged tokens; M sums in the order of the model."""

    names: tuple[str, ...]
    bits: tuple[float, ...]
    """Bits on the wire per value, C."""
    modules: tuple[str, ...]
    """The modules that are summed, and those that hand on a hop, M."""
    figures: torch.Tensor
    """fp32 [C, 4, W, T] of `metrics.compare`."""
    depth: torch.Tensor
    """fp64 [C, M, 4], sums of squares over one token in 16: the error that a sum adds, the exact sum, its distance
    from plain's sum, and plain's sum."""

    @property
    def added(self) -> torch.Tensor:
        """Error that each sum adds, relative to the sum: [C, M], roots of ratios of squares."""
        return (self.depth[..., 0] / self.depth[..., 1]).sqrt()

    @property
    def gathered(self) -> torch.Tensor:
        """Distance of each sum from plain's, relative to plain's: [C, M]; includes the errors of all earlier sums."""
        return (self.depth[..., 2] / self.depth[..., 3]).sqrt()


@torch.inference_mode()
def measure(
    model: Any,
    ranks: int,
    variants: Mapping[str, Policy],
    windows: Sequence[torch.Tensor],
    *,
    stages: int = 1,
    expert_ranks: int = 1,
    hosts: int = 0,
    calibration: Calibration | None = None,
    folder: Path | None = None,
    origin: str = "",
    progress: Callable[[], object] = lambda: None,
) -> Measurement:
    """Compare policies with plain, teacher-forced: each token is judged by its predecessors in the window.

    Args:
        model, ranks, stages, expert_ranks, hosts, calibration: see `simulated`.
        variants: policies by name, their ``min_bytes`` ignored; plain is measured too, as the first.
        windows: token ids, each [T + 1] with the same T.
        folder: keeps the figures of each window. An interrupted measurement of the same things is continued, another
            one is begun anew. None keeps nothing.
        origin: identity of the model, different for every other model.
        progress: called after each policy's pass over a window, plain's too.

    Raises:
        ValueError: windows that differ in length, or none, or what `simulated` raises.
    """
    if not windows or len({len(window) for window in windows}) > 1:
        raise ValueError("accuracy is measured on one or more windows of the same length")
    # Windows are cut for convenience, so no sum is too small here.
    policies = {name: replace(p, min_bytes=0) for name, p in {"none": Policy(codec="none"), **variants}.items()}
    with simulated(
        model, ranks, stages=stages, expert_ranks=expert_ranks, hosts=hosts, calibration=calibration
    ) as simulation:
        sizes = [ranks, stages, expert_ranks, hosts]
        facts = [origin, sizes, calibration and calibration.origin, [*map(repr, policies.items())]]
        found = by_window(
            windows,
            lambda window: _window(model, simulation, list(policies.values()), window.to(model.device), progress),
            folder,
            facts,
            len(policies),
            progress,
        )
        bits = tuple(simulation.bits_per_value(policy) for policy in policies.values())
    return Measurement(
        names=tuple(policies),
        bits=bits,
        modules=tuple(simulation.modules),
        figures=torch.stack([figures for figures, _ in found], 2),
        depth=torch.stack([depth for _, depth in found]).sum(0),
    )


def by_window(
    windows: Sequence[torch.Tensor],
    find: Callable[[torch.Tensor], T],
    folder: Path | None,
    facts: Sequence[Any],
    passes: int,
    progress: Callable[[], object],
) -> list[T]:
    """Call ``find(window)`` for each window, and keep what it finds.

    Args:
        windows: token ids.
        find: returns a tensor, or a tuple of them.
        folder: keeps them, by window; what is there already is read. None keeps nothing.
        facts: identity of the measurement beside the windows; in the folder of another one, all begins anew.
        passes: number of parts that a window counts for in `progress`.
        progress: called after the last part of each window, which is kept by then; `find` calls it after the others.
    """
    if folder:
        digests = [hashlib.sha256(window.numpy().tobytes()).hexdigest() for window in windows]
        _open(folder, json.dumps([*facts, digests]))
    found = []
    for number, window in enumerate(windows):
        path = folder and folder / f"{number:06}.pt"
        if path and path.is_file():
            found.append(torch.load(path, weights_only=True))
            for _ in range(passes - 1):
                progress()
        else:
            found.append(find(window))
            if path:
                _save(found[-1], path)
        progress()
    return found


def _window(
    model: Any,
    simulation: Simulation,
    policies: Sequence[Policy],
    ids: torch.Tensor,
    progress: Callable[[], object],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure one window: [C, 4, T] figures and [C, M, 4] depth. Calls `progress` after all passes but the last."""
    figures, depths = [], []
    plain, reference = torch.empty(0, dtype=torch.float32, device="cpu"), []
    for policy in policies:
        if figures:
            progress()
        simulation.policy = policy
        depth = _Depth(list(simulation.modules), reference)
        simulation.observe = depth
        logits = model(ids[None], use_cache=False).logits[0, :-1]
        plain = plain if figures else logits
        figures.append(compare(plain, logits, ids[1:]))
        depths.append(depth.squares)
    return torch.stack(figures), torch.stack(depths)


class _Depth:
    """Add up the distances of one forward pass's sums from the exact sums and from those of the first pass."""

    def __init__(self, modules: list[str], reference: list[torch.Tensor]):
        self.squares = torch.zeros(len(modules), 4, dtype=torch.float64, device="cpu")
        self._places = {name: place for place, name in enumerate(modules)}
        self._reference, self._is_first, self._calls = reference, not reference, 0

    def __call__(self, name: str, parts: Sequence[torch.Tensor], total: torch.Tensor):
        *exact, found = (x.reshape(-1, x.shape[-1])[::EVERY].float() for x in (*parts, total))
        exact = torch.stack(exact).sum(0)
        if self._is_first:
            self._reference.append(found)
        plain = self._reference[self._calls]
        self._calls += 1
        squares = torch.stack([x.double().square().sum() for x in (found - exact, exact, found - plain, plain)])
        self.squares[self._places[name]] += squares.cpu()


def _open(folder: Path, identity: str):
    """Prepare `folder` for the measurement `identity`; files of another measurement are removed."""
    path = folder / _RUN
    if path.is_file() and path.read_text() == identity:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.pt"):
        old.unlink()
    path.write_text(identity)


def _save(found: Any, path: Path):
    """Write `found` to `path` atomically."""
    part = path.with_suffix(".part")
    torch.save(found, part)
    os.replace(part, path)
