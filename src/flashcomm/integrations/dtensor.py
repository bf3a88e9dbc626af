"""Compress the sums and gathers of torch's tensor and sequence parallel modules (DTensor).

    from flashcomm.integrations.dtensor import ColwiseParallel, RowwiseParallel
    parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel(codec="int8g128")})

These classes have the names of those of `torch.distributed.tensor.parallel`, and a codec. They act where a module's
input or output changes its layout, on a mesh of one dimension:

    Partial -> Replicate    `flashcomm.all_reduce`: after a row-wise module
    Partial -> Shard        `flashcomm.reduce_scatter`: the same, under sequence parallelism
    Shard -> Replicate      `flashcomm.all_gather`: before a column-wise module, under sequence parallelism

Any other change is torch's own; sums and gathers among those are counted in `flashcomm.stats()`.

With `gradients`, a second codec, the classes train: a gradient goes back from the new layout to the old one in that
codec. Its layouts are torch's, so the sum of gradients before a column-wise module is the change Partial -> Replicate,
or Partial -> Shard under sequence parallelism. Without it, tensors that require gradients are refused.

Source: the layouts are those of Reducing Activation Recomputation (arXiv 2205.05198); to compress them is our own.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, parallel

from flashcomm import codecs, collectives
from flashcomm.codecs import Codec
from flashcomm.collectives.stats import record_plain
from flashcomm.integrations.sums import refuse_unbound


class RowwiseParallel(parallel.RowwiseParallel):
    """A row-wise linear whose partial outputs are summed in `codec`.

    Args:
        codec: wire format of the all-reduce, or of the reduce-scatter if `output_layouts` is a `Shard`.
        algorithm: as for `flashcomm.all_reduce`, or for `flashcomm.reduce_scatter`.
        gradients: wire format of the gradients' collective; None to refuse gradients.
        input_layouts, output_layouts, use_local_output: those of torch's class.

    Raises:
        ValueError: unknown codec, or one that needs a calibration.

    Example::

        parallelize_module(block, mesh, {"down": RowwiseParallel(codec="int4g32", output_layouts=Shard(1))})
    """

    def __init__(
        self,
        *,
        codec: str | Codec = "int8g128",
        algorithm: str = "auto",
        gradients: str | Codec | None = None,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output)
        self.codec, self.algorithm, self.gradients = _usable(codec), algorithm, _usable_gradients(gradients)

    def _prepare_output_fn(self, output_layouts, use_local_output, mod, outputs, device_mesh):
        outputs = redistribute(outputs, output_layouts, self.codec, self.algorithm, self.gradients)
        return outputs.to_local() if use_local_output else outputs


class ColwiseParallel(parallel.ColwiseParallel):
    """A column-wise linear whose input, if `input_layouts` is a `Shard`, is gathered in `codec`.

    Args:
        codec: wire format of the all-gather.
        gradients: wire format of the gradients' collective; None to refuse gradients.
        input_layouts, output_layouts, use_local_output: those of torch's class.

    Raises:
        ValueError: unknown codec, or one that needs a calibration.

    Example::

        parallelize_module(block, mesh, {"up": ColwiseParallel(codec="int8g128", input_layouts=Shard(1))})
    """

    def __init__(
        self,
        *,
        codec: str | Codec = "int8g128",
        gradients: str | Codec | None = None,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output)
        self.codec, self.gradients = _usable(codec), _usable_gradients(gradients)

    def _prepare_input_fn(self, input_layouts, desired_input_layouts, mod, inputs, device_mesh):
        x = inputs[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, device_mesh, input_layouts, run_check=False)
        return redistribute(x, desired_input_layouts, self.codec, gradients=self.gradients)


class PrepareModuleInput(parallel.PrepareModuleInput):
    """Inputs that several column-wise linears share, gathered once, in `codec`.

    Args:
        codec: wire format of the all-gather.
        gradients: wire format of the gradients' collective; None to refuse gradients.
        input_layouts, desired_input_layouts, input_kwarg_layouts, desired_input_kwarg_layouts, use_local_output: those
            of torch's class.

    Raises:
        ValueError: unknown codec, or one that needs a calibration.

    Example::

        gathered = PrepareModuleInput(codec="int8g128", input_layouts=Shard(1), desired_input_layouts=Replicate())
        parallelize_module(block, mesh, {"attention": gathered})
    """

    def __init__(
        self,
        *,
        codec: str | Codec = "int8g128",
        gradients: str | Codec | None = None,
        input_layouts: Placement | tuple[Placement | None, ...] | None = None,
        desired_input_layouts: Placement | tuple[Placement | None, ...] | None = None,
        input_kwarg_layouts: dict[str, Placement] | None = None,
        desired_input_kwarg_layouts: dict[str, Placement] | None = None,
        use_local_output: bool = False,
    ):
        super().__init__(
            input_layouts=input_layouts,
            desired_input_layouts=desired_input_layouts,
            input_kwarg_layouts=input_kwarg_layouts,
            desired_input_kwarg_layouts=desired_input_kwarg_layouts,
            use_local_output=use_local_output,
        )
        self.codec, self.gradients = _usable(codec), _usable_gradients(gradients)

    def _prepare_input_arg(
        self, input: Any, mesh: DeviceMesh, input_layout: Placement | None, desired_layout: Placement | None
    ) -> Any:
        if input_layout is None or desired_layout is None:
            return super()._prepare_input_arg(input, mesh, input_layout, desired_layout)
        x = input if isinstance(input, DTensor) else DTensor.from_local(input, mesh, (input_layout,), run_check=False)
        x = redistribute(x, (desired_layout,), self.codec, gradients=self.gradients)
        return x.to_local() if self.use_local_output else x


def redistribute(
    x: DTensor,
    placements: "tuple[Placement, ...]",
    codec: str | Codec = "int8g128",
    algorithm: str = "auto",
    gradients: str | Codec | None = None,
) -> DTensor:
    """``x.redistribute(placements=placements)``, in `codec` where that sums or gathers.

    Args:
        x: bf16, fp16 or fp32 of any shape; a shard may have any size, also 0 or another than its peers'.
        placements: one for each dimension of x's mesh.
        codec: wire format.
        algorithm: of the collectives that do it, in both directions.
        gradients: wire format of the way back of gradients; None to refuse an `x` that requires one.

    Returns:
        The same values in the new layout, those that crossed the wire rounded by the codec; where they are replicated,
        with the same bits on every rank.

    Raises:
        ValueError, RuntimeError: those of the verbs of flashcomm.

    Example::

        y = redistribute(x @ w, (Replicate(),), "int8g128")  # x is Shard(1), w is Shard(0), so x @ w is Partial
    """
    if gradients is not None and x.requires_grad and torch.is_grad_enabled():
        moved = _Redistribute.apply(x, placements, codec, algorithm, codecs.parse(gradients))
        assert isinstance(moved, DTensor)
        return moved
    return _moved(x, placements, codec, algorithm)


class _Redistribute(torch.autograd.Function):
    """A change of layout that gradients take back, in a codec of their own, as torch's does without one."""

    @staticmethod
    def forward(
        ctx: Any, x: DTensor, placements: "tuple[Placement, ...]", codec: Any, algorithm: str, gradients: Codec
    ) -> DTensor:
        # The gradient of a sum is that of each of its terms, so ranks that have it all keep it.
        ctx.back = tuple(Replicate() if old.is_partial() else old for old in x.placements)
        ctx.algorithm, ctx.gradients = algorithm, gradients
        if x.placements == placements:
            # An input that is returned itself would be taken for one that was changed in place.
            return _dtensor(x.to_local(), x, placements)
        return _moved(x, placements, codec, algorithm)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> Any:
        return _moved(gradient, ctx.back, ctx.gradients, ctx.algorithm), None, None, None, None


def _moved(x: DTensor, placements: "tuple[Placement, ...]", codec: str | Codec, algorithm: str) -> DTensor:
    if x.placements == placements:
        return x
    verb = _verb(x, placements)
    if verb is None:
        return x.redistribute(placements=placements, async_op=True)
    local = x.to_local()
    if isinstance(local, functional.AsyncCollectiveTensor):
        local = functional.wait_tensor(local)
    return _dtensor(verb(local, x, placements[0], codec, algorithm), x, placements)


def _dtensor(local: torch.Tensor, x: DTensor, placements: "tuple[Placement, ...]") -> DTensor:
    """The tensor of x's shape whose part on this rank is `local`."""
    return DTensor.from_local(local, x.device_mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def _verb(x: DTensor, placements: "tuple[Placement, ...]") -> Any:
    """Find the function that makes the new layout of `x` in a codec; None if torch must make it."""
    changes = [(old, new) for old, new in zip(x.placements, placements, strict=True) if old != new]
    moving = [(old, new) for old, new in changes if old.is_partial() or (old.is_shard() and new.is_replicate())]
    if not moving:
        return None
    old, new = moving[0]
    verb = _gather if old.is_shard() else _sum_and_keep if new.is_shard() else _sum
    why_not = _why_not(x, old, new)
    if why_not:
        record_plain(_NAMES[verb], why_not)
    return None if why_not else verb


def _why_not(x: DTensor, old: Placement, new: Placement) -> str:
    """Explain why torch must make the layout `new`; "" if a collective of ours can."""
    if x.device_mesh.ndim > 1:
        return f"a mesh of {x.device_mesh.ndim} dimensions"
    if x.dtype not in codecs.FLOAT_DTYPES:
        return f"dtype {x.dtype}"
    # Embeddings have a layout of their own, which masks values first.
    if old.is_partial() and old != Partial():
        return f"the layout {old} is no plain sum"
    # Groups of a codec run along this dimension, and would mix tokens.
    if any(layout.is_shard(dim) for layout in (old, new) for dim in (-1, x.dim() - 1)):
        return "shards of the last dimension"
    return ""


def _sum(local: torch.Tensor, x: DTensor, new: Replicate, codec: str | Codec, algorithm: str) -> torch.Tensor:
    return _done(collectives.all_reduce(local, codec, x.device_mesh, algorithm=algorithm))


def _sum_and_keep(local: torch.Tensor, x: DTensor, new: Shard, codec: str | Codec, algorithm: str) -> torch.Tensor:
    mesh, dim = x.device_mesh, new.dim % x.dim()
    rows = _padded(local.movedim(dim, 0), mesh.size() * _part(x, dim))
    kept = _done(collectives.reduce_scatter(rows.contiguous(), codec, mesh, algorithm=algorithm))
    return kept[: _held(x, dim)].movedim(0, dim).contiguous()


def _gather(local: torch.Tensor, x: DTensor, new: Replicate, codec: str | Codec, algorithm: str) -> torch.Tensor:
    (old,) = x.placements
    assert isinstance(old, Shard)
    dim = old.dim % x.dim()
    rows = _padded(local.movedim(dim, 0), _part(x, dim))
    everyone = _done(collectives.all_gather(rows.contiguous(), codec, x.device_mesh, algorithm=algorithm))
    return everyone[: x.shape[dim]].movedim(0, dim).contiguous()


_NAMES = {_sum: "all_reduce", _sum_and_keep: "reduce_scatter", _gather: "all_gather"}


def _part(x: DTensor, dim: int) -> int:
    """Size of a full shard of dimension `dim`; the last shards may be smaller or empty."""
    return -(-x.shape[dim] // x.device_mesh.size())


def _held(x: DTensor, dim: int) -> int:
    """Size of this rank's shard of dimension `dim`."""
    part = _part(x, dim)
    return min(part, max(0, x.shape[dim] - part * x.device_mesh.get_local_rank()))


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`rows` with zeros after them, `count` in all."""
    missing = count - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _done(out: "torch.Tensor | collectives.Work") -> torch.Tensor:
    assert isinstance(out, torch.Tensor)
    return out


def _usable_gradients(codec: str | Codec | None) -> Codec | None:
    return None if codec is None else _usable(codec)


def _usable(codec: str | Codec) -> Codec:
    codec = codecs.parse(codec)
    refuse_unbound([codec], "which these classes cannot bind")
    return codec
