"""Compress the all-reduces of one tensor-parallel transformers model (``DistributedConfig(tp_size=N)``).

    with flashcomm.integrations.transformers.compressed(model, "int8g128"):
        model.generate(...)

How: each module that reduces is marked, per thread or greenlet, while it runs; a summing `torch.distributed.all_reduce`
over the model's own tensor-parallel group then becomes `flashcomm.all_reduce`. So transformers keeps doing the rest
(biases are added once, after the sum), other models and groups are untouched, and `undo` takes the marks away.

Marked are the modules that [`loaded`](loaded.py) finds: row-parallel linears, the row-wise embedding, MoE experts.
All of them send the sum through `dist.all_reduce`, or through a DTensor, which ends in the functional collective; those
two names are what is patched, and only while a model is compressed. A marked module that turns out to send no sum is
counted in `flashcomm.stats()`, and so is a sum over the model's ranks that no marked module makes.

``torch.compile(model)`` works, before or after. Marked modules run between the graphs, so ``fullgraph=True`` does not.
"""

import contextvars
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed import distributed_c10d

from flashcomm import codecs, collectives
from flashcomm.calibration import Calibration, MovingReach
from flashcomm.codecs import Codec, Features
from flashcomm.collectives.stats import record_plain
from flashcomm.integrations import loaded
from flashcomm.integrations.patches import Patches
from flashcomm.integrations.sums import apply, refuse_unbound, start_plain
from flashcomm.policy import Policy
from flashcomm.transports.backend import is_plain

# Entries are of one context, so threads, and greenlets that take turns on one, do not see each other's.
_running: "contextvars.ContextVar[tuple]" = contextvars.ContextVar("running", default=())
_handles: "list[Compression]" = []

_OUTSIDE = "outside of the plan: made by no module that is compressed"
"""Reason for a sum over the ranks of a compressed model that stays plain."""
_log = logging.getLogger("flashcomm")
_patch_lock = threading.Lock()
_patches = Patches(__name__)


def tensor_parallel_argument() -> dict[str, Any]:
    """Make the arguments that load a model over all ranks, whatever the release of transformers.

    Returns:
        Keyword arguments of `from_pretrained`: ``distributed_config``, or ``tp_plan`` before transformers 5.15.

    Raises:
        ValueError: `torch.distributed.init_process_group` has not been called.

    Example::

        dist.init_process_group("gloo")
        model = AutoModelForCausalLM.from_pretrained(directory, **tensor_parallel_argument())
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    ranks = dist.get_world_size()
    if "tp_size" in {field.name for field in fields(DistributedConfig)}:
        return {"distributed_config": DistributedConfig(tp_size=ranks)}
    return {"tp_plan": "auto"}


def compress(
    model: Any,
    codec: str | Codec | Policy = "int8g128",
    *,
    modules: str = "",
    algorithm: str = "auto",
    calibration: "Calibration | str | Path | None" = None,
    strict: bool = False,
    batch_invariant: bool = False,
) -> "Compression":
    """Send the all-reduces of `model` in `codec`, until ``undo()`` of the returned handle.

    Args:
        model: a transformers model, loaded under torchrun with ``from_pretrained(...,
            distributed_config=DistributedConfig(tp_size=N))``, or a wrapper around one, such as what `torch.compile` or
            PEFT's `get_peft_model` returns. Releases before 5.15 take ``tp_plan="auto"`` instead.
        codec: of all sums, or a `Policy`: then its ``min_bytes``, its ``phase`` and, unless another is given, its
            ``algorithm`` count too.
        modules: regular expression; only modules in whose name it is found are compressed, all that reduce if empty.
        calibration: for codecs that need one (``+keep64``, ``int4static``): what `calibrate` returned, or its file.
        algorithm, strict, batch_invariant: as for `flashcomm.all_reduce`.

    Returns:
        A `Compression`.

    Raises:
        ValueError: unknown codec, or one that lacks its calibration, or a model that is not tensor parallel, is
            compressed already, or has weights that transformers cannot split.

    Example::

        handle = compress(model, "int4g128:int8g128")
        model(input_ids)
        handle.undo()
    """
    options = {"strict": strict, "batch_invariant": batch_invariant}
    if isinstance(codec, Policy) and codec.overlap != "off":
        _log.warning("a model's prompts run in parts by flashcomm.overlap.prefill, not by the policy's overlap")
    if isinstance(calibration, str | Path):
        calibration = Calibration.load(calibration)
    return Compression(model, _parsed(codec), modules=modules, algorithm=algorithm, calibration=calibration, **options)


@contextmanager
def compressed(model: Any, codec: str | Codec | Policy = "int8g128", **options: Any):
    """`compress` for the length of a ``with`` block; yields the handle."""
    handle = compress(model, codec, **options)
    try:
        yield handle
    finally:
        handle.undo()


@torch.inference_mode()
def calibrate(
    model: Any,
    batches: Iterable[torch.Tensor],
    *,
    gamma: float = 0.01,
    modules: str = "",
    origin: str = "",
) -> Calibration:
    """Run `model` on real text, uncompressed, and record how far each feature reaches.

    Args:
        model: tensor parallel, not compressed.
        batches: token ids, each [tokens]; the same on every rank. A few dozen batches of a thousand tokens are enough.
        gamma: weight of a new batch in the moving averages.
        modules: see `compress`.
        origin: a remark for the file.

    Returns:
        The same `Calibration` on every rank.

    Raises:
        ValueError: no batches, or a model that `compress` refuses.
    """
    seen: dict[str, tuple[MovingReach, MovingReach]] = {}

    def observe(name: str, part: torch.Tensor, total: torch.Tensor):
        averages = seen.setdefault(name, (MovingReach(gamma), MovingReach(gamma)))
        for average, x in zip(averages, (part, total), strict=True):
            average.add(x)

    with compressed(model, "none", modules=modules) as handle:
        handle._observe = observe
        for ids in batches:
            model(ids[None].to(model.device), use_cache=False)
        group = handle.group
    if not seen:
        raise ValueError("calibration needs at least one batch of text")
    features = {}
    for name, (part, total) in seen.items():
        rows = [torch.empty_like(part.result()) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, part.result(), group=group)
        features[name] = Features(torch.stack([*rows, total.result()]))
    return Calibration(features, origin)


class Compression:
    """A model whose all-reduces are compressed; made by `compress`."""

    codec: Codec | Policy
    """The wire format, or a policy for each module. May be assigned to between forward passes, on all ranks alike."""
    algorithm: str
    """Algorithm of `flashcomm.all_reduce`; may be assigned to like `codec`."""
    modules: dict[str, str]
    """Styles in transformers' plan, by the name of each module whose sum is compressed."""
    calls: dict[str, int]
    """Number of sums that went through flashcomm so far, by module."""

    calibration: Calibration | None
    """The calibration to which codecs are bound."""
    group: dist.ProcessGroup
    """The ranks over which the model is tensor parallel."""
    wait: "Callable[[Callable[[], Any], str], torch.Tensor] | None"
    """Function that makes the sums while it is set. It gets one that starts a sum and returns a `flashcomm.Work`,
    and the module's name; it returns the sum."""

    def __init__(
        self,
        model: Any,
        codec: Codec | Policy,
        *,
        modules: str,
        algorithm: str,
        calibration: Calibration | None = None,
        **options: Any,
    ):
        self.codec, self.algorithm, self.calibration, self._options = codec, algorithm, calibration, options
        model = loaded.unwrapped(model)
        self.group = loaded.tensor_parallel_group(model)
        self._bound: dict[tuple[Codec, str], Codec] = {}
        self._decoding = False
        self._observe: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None
        self.wait = None
        if compression_of(model):
            raise ValueError("this model is compressed already: undo() the first compression, or assign to its .codec")
        reducing = {name: (module, style) for name, module, style in loaded.reducing_modules(model)}
        if modules:
            reducing = {name: found for name, found in reducing.items() if re.search(modules, name)}
        if not reducing:
            raise ValueError(
                f"no module to compress: no module of this model that reduces over ranks matches {modules!r}"
            )
        loaded.refuse_lost_weights(module for module, _ in reducing.values())
        refuse_unbound(map(self._codec_of, reducing))
        self.modules = {name: style for name, (_, style) in reducing.items()}
        self.calls = dict.fromkeys(reducing, 0)
        self._model = model
        self._marks = Patches("flashcomm.integrations.transformers.compress")
        self._hooks: list[Any] = []
        try:
            for name, (module, _) in reducing.items():
                self._mark(name, module)
            _patch()
        except RuntimeError as error:
            self._unmark()
            raise ValueError(f"this model cannot be compressed now: {error}") from error
        _handles.append(self)

    def undo(self):
        """Restore the model. Harmless when repeated."""
        self._unmark()
        if self in _handles:
            _handles.remove(self)
            _unpatch()

    def _mark(self, name: str, module: torch.nn.Module):
        """Note on the stack when `module` and its hooks run."""
        inner: Callable = module._compiled_call_impl or module._call_impl

        # A graph would not see the stack, so a compiled model leaves its graph for this module.
        @torch.compiler.disable
        def call(*args: Any, **kwargs: Any):
            self._enter(name)
            try:
                return inner(*args, **kwargs)
            finally:
                self._leave(name)

        self._marks.replace(module, "_compiled_call_impl", call)
        # Dynamo of torch 2.8 does not look for it, and leaves its graph for a hook only.
        self._hooks.append(module.register_forward_pre_hook(_outside_of_graphs))

    def _unmark(self):
        self._marks.undo()
        for hook in self._hooks:
            hook.remove()

    def _enter(self, name: str):
        _running.set((*_running.get(), (self, name, self.calls[name])))

    def _leave(self, name: str):
        # Entries of modules that raised before their own hook may lie above ours.
        running = _running.get()
        while running[-1][:2] != (self, name):
            running = running[:-1]
        _running.set(running[:-1])
        if self.calls[name] == running[-1][2]:
            record_plain("all_reduce", f"no sum seen in {self.modules[name]} module {re.sub(r'[0-9]+', '*', name)}")

    def reduce(self, name: str, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sum `x`, the output of module `name`, over the ranks."""
        self.calls[name] += 1
        part = x.reshape(-1, x.shape[-1]).clone() if self._observe else None
        start = functools.partial(self._start, name, x, out)
        result = self.wait(functools.partial(start, async_op=True), name) if self.wait else start()
        assert isinstance(result, torch.Tensor)
        if self._observe and part is not None:
            self._observe(name, part, result.reshape(part.shape))
        return result

    def _codec_of(self, name: str) -> Codec:
        """Find the codec of a module, bound to its calibration."""
        codec = self.codec.codec_for(name) if isinstance(self.codec, Policy) else self.codec
        if self.calibration is None:
            return codec
        key = (codec, name)
        if key not in self._bound:
            rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
            self._bound[key] = self.calibration.bind(codec, name, rank=rank, ranks=ranks)
        return self._bound[key]

    def _start(
        self, name: str, x: torch.Tensor, out: torch.Tensor | None, async_op: bool = False
    ) -> "torch.Tensor | collectives.Work":
        """Start the all-reduce of `x` after a module."""
        codec, policy = self._codec_of(name), self.codec
        reduce = functools.partial(collectives.all_reduce, x, group=self.group, out=out, async_op=async_op)
        if not isinstance(policy, Policy):
            return reduce(codec=codec, algorithm=self.algorithm, **self._options)
        # Experts see all tokens in one dimension, after other modules of the same pass saw the sequences.
        if x.dim() > 2:
            self._decoding = x.shape[-2] == 1
        choice = policy.choose(x.numel() * x.element_size(), x.dtype, name, self._decoding, codec=codec)
        algorithm = choice.algorithm if self.algorithm == "auto" else self.algorithm

        plain = functools.partial(start_plain, x, codec, self.group, choice.reason, out=out, async_op=async_op)
        compressed = functools.partial(reduce, codec=codec, algorithm=algorithm, **self._options)
        # The call itself counts the reason.
        return apply(choice, compressed=compressed, plain=plain, count=lambda reason: None)


def _nothing(module: torch.nn.Module, args: Any):
    """Do nothing."""


_outside_of_graphs: Any = torch.compiler.disable(_nothing)


def _parsed(codec: str | Codec | Policy) -> Codec | Policy:
    return codec if isinstance(codec, Policy) else codecs.parse(codec)


def compression_of(model: Any) -> "Compression | None":
    """Find the compression of `model`; None if it is not compressed."""
    within = loaded.unwrapped(model)
    return next((handle for handle in _handles if handle._model is within), None)


def _kind_and_group(op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> tuple[bool, bool, Any]:
    """Whether an all-reduce with these arguments is a sum, whether the caller waits for it, and its group."""
    return op == dist.ReduceOp.SUM, not async_op, group


def _marked(x: torch.Tensor, is_sum: bool, waits: bool, group: Any) -> "tuple[Compression, str] | None":
    """Find the compression and the module of this all-reduce; None if it stays plain."""
    # Sums of flashcomm itself pass through.
    if not is_sum or not x.is_floating_point() or is_plain():
        return None
    group, running = _resolve(group), _running.get()
    if running and waits and x.dtype in codecs.FLOAT_DTYPES and running[-1][0].group == group:
        return running[-1][:2]
    if any(handle.group == group for handle in _handles):
        record_plain("all_reduce", _OUTSIDE)
    return None


@torch.compiler.disable
def _compressed_sum(marked: "tuple[Compression, str]", x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    handle, name = marked
    if type(x) is not torch.Tensor:
        x = functional.wait_tensor(x)  # the unfinished result of a functional collective
    return handle.reduce(name, x, out)


def _patch():
    """Replace the two functions that start sums."""
    with _patch_lock:
        if _patches.has(dist, "all_reduce"):
            return
        plain: Any = dist.all_reduce
        plain_functional: Any = functional.all_reduce

        # A module that is compressed runs between graphs, so what the compiler traces belongs to others, in one graph.
        compiling = torch.compiler.is_dynamo_compiling

        @functools.wraps(plain)
        def all_reduce(tensor, *args, **kwargs):
            if compiling():
                return plain(tensor, *args, **kwargs)
            marked = _marked(tensor, *_kind_and_group(*args, **kwargs))
            if marked is None:
                return plain(tensor, *args, **kwargs)
            _compressed_sum(marked, tensor, tensor)  # pyright: ignore[reportCallIssue]
            return None

        @functools.wraps(plain_functional)
        def functional_all_reduce(self, reduceOp, group, tag=""):  # noqa: N803
            if compiling():
                return plain_functional(self, reduceOp, group, tag)
            marked = _marked(self, reduceOp.lower() == "sum", True, group)
            if marked is None:
                return plain_functional(self, reduceOp, group, tag)
            return _compressed_sum(marked, self, None)  # pyright: ignore[reportCallIssue]

        _patches.replace(dist, "all_reduce", all_reduce)
        _patches.replace(functional, "all_reduce", functional_all_reduce)


def _unpatch():
    with _patch_lock:
        if not _handles:
            _patches.undo()


def _resolve(group: Any) -> Any:
    """Find the process group that a collective names: by None, a name, itself, a mesh, or a mesh and a dimension."""
    if group is None:
        return dist.group.WORLD
    if isinstance(group, str):
        return distributed_c10d._resolve_process_group(group)  # pyright: ignore
    if isinstance(group, tuple):
        mesh, dim = group
        return mesh.get_group(dim)
    return group.get_group() if hasattr(group, "get_group") else group
