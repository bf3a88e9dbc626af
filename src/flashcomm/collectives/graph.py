"""The four collectives as operators of torch: what `torch.compile` makes of a call, one node of the graph.

    flashcomm.all_reduce(x, "int8g128", tp)  ->  torch.ops.flashcomm.all_reduce(x, "int8g128", "0", "auto", ...)

Codecs and groups travel by name. An operator runs the ordinary call, with its agreement between ranks, its counters and
its errors; what shapes and names tell is checked while the graph is made. Imported when a function is first compiled,
because the compiler takes seconds to load.

Guaranteed: a call is never dropped, even if nobody uses its result, and the calls of one graph run in the order of the
program, because they are registered as effects, which torch orders like prints. So ranks that run the same program stay
in step. Not ordered by torch: these calls and other collectives of the same graph (`torch.distributed`'s, a DTensor's)
that do not depend on each other; they keep the same order on all ranks, as long as all ranks compile the same graph.

Not supported: gradients; `flashcomm.training` runs between graphs. An asynchronous call breaks the graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._higher_order_ops import effects
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.fx.node import has_side_effect

from flashcomm import codecs, planner
from flashcomm.codecs import Codec
from flashcomm.collectives import arguments
from flashcomm.collectives.call import start
from flashcomm.collectives.group import group_of
from flashcomm.collectives.rules import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, Verb
from flashcomm.collectives.topology import process_group
from flashcomm.kernels.graph import into, name_of

AnyGroup = dist.ProcessGroup | DeviceMesh | None

_meshes: dict[str, DeviceMesh] = {}
"""Meshes with levels, by the names of their groups between hosts and inside."""


def all_reduce(
    x: torch.Tensor,
    codec: "str | Codec",
    group: AnyGroup,
    algorithm: str,
    out: torch.Tensor | None,
    async_op: bool,
    strict: bool,
    batch_invariant: bool,
) -> torch.Tensor:
    """`flashcomm.all_reduce` in a graph."""
    if async_op:
        options = {"strict": strict, "batch_invariant": batch_invariant}
        return _between_graphs(ALL_REDUCE, x, codec, group, algorithm=algorithm, out=out, **options)
    _check_grad(x)
    name, of = name_of(codec), _name_of(group)
    return into(out, torch.ops.flashcomm.all_reduce(x, name, of, algorithm, strict, batch_invariant))


def reduce_scatter(
    x: torch.Tensor,
    codec: "str | Codec",
    group: AnyGroup,
    input_split_sizes: Sequence[int] | None,
    algorithm: str,
    out: torch.Tensor | None,
    async_op: bool,
) -> torch.Tensor:
    """`flashcomm.reduce_scatter` in a graph."""
    if async_op:
        splits = input_split_sizes, None
        return _between_graphs(REDUCE_SCATTER, x, codec, group, algorithm=algorithm, out=out, splits=splits)
    _check_grad(x)
    name, of = name_of(codec), _name_of(group)
    return into(out, torch.ops.flashcomm.reduce_scatter(x, name, of, input_split_sizes, algorithm))


def all_gather(
    x: torch.Tensor,
    codec: "str | Codec",
    group: AnyGroup,
    output_split_sizes: Sequence[int] | None,
    algorithm: str,
    out: torch.Tensor | None,
    async_op: bool,
) -> torch.Tensor:
    """`flashcomm.all_gather` in a graph."""
    if async_op:
        splits = None, output_split_sizes
        return _between_graphs(ALL_GATHER, x, codec, group, algorithm=algorithm, out=out, splits=splits)
    _check_grad(x)
    name, of = name_of(codec), _name_of(group)
    return into(out, torch.ops.flashcomm.all_gather(x, name, of, output_split_sizes, algorithm))


def all_to_all(
    x: torch.Tensor,
    codec: "str | Codec",
    group: AnyGroup,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
    algorithm: str,
    out: torch.Tensor | None,
    async_op: bool,
) -> torch.Tensor:
    """`flashcomm.all_to_all` in a graph."""
    if async_op:
        splits = input_split_sizes, output_split_sizes
        return _between_graphs(ALL_TO_ALL, x, codec, group, algorithm=algorithm, out=out, splits=splits)
    _check_grad(x)
    name, of = name_of(codec), _name_of(group)
    return into(out, torch.ops.flashcomm.all_to_all(x, name, of, output_split_sizes, input_split_sizes, algorithm))


def async_op_needs_a_graph_break(verb: Verb, *args: Any, **options: Any) -> Any:
    """Make an asynchronous call between two graphs, because its `Work` is not a tensor."""
    return start(verb, *args, async_op=True, **options)


# With ``fullgraph=True`` torch refuses it by its name.
_between_graphs: Any = torch.compiler.disable(async_op_needs_a_graph_break)


def _check_grad(x: torch.Tensor):
    if x.requires_grad and torch.is_grad_enabled():
        _refuse_gradient(x)


# With ``fullgraph=True`` torch gives the reason; before torch 2.11 it does not tell what an error inside a graph says.
_refuse_gradient: Any = torch.compiler.disable(arguments.check_grad, reason=arguments.CUTS_THE_GRADIENT)


def _name_of(group: AnyGroup) -> str:
    """The string by which an operator finds `group` again; "" for the default group at that time."""
    if group is None:
        return ""
    if isinstance(group, dist.ProcessGroup):
        return group.group_name
    if isinstance(group, DeviceMesh) and group.get_coordinate() is not None:
        if group.ndim == 1:
            return group.get_group(0).group_name
        if group.ndim == 2:
            between, inside = group.get_group(0).group_name, group.get_group(1).group_name
            if group.shape[0] == 1 or group.shape[1] == 1:
                return between if group.shape[1] == 1 else inside
            return _name_of_levels(f"{between}/{inside}", group)
    return _refusal(group)


@torch.compiler.assume_constant_result
def _name_of_levels(name: str, mesh: DeviceMesh) -> str:
    # What torch 2.13 passes is a stand-in that holds the mesh.
    _meshes[name] = getattr(mesh, "real_obj", mesh)
    return name


@torch.compiler.assume_constant_result
def _refusal(group: Any) -> Any:
    # The mesh or group does not belong to this process, and the error says what to do.
    process_group(getattr(group, "real_obj", group))


def _group(name: str) -> AnyGroup:
    if not name:
        return None
    return _meshes[name] if name in _meshes else distributed_c10d._resolve_process_group(name)  # pyright: ignore


def _run(verb: Verb, x: torch.Tensor, codec: str, group: str, **options: Any) -> torch.Tensor:
    result = start(verb, x, codecs.named(codec), _group(group), **options)
    assert isinstance(result, torch.Tensor)
    return result


def _known(x: torch.Tensor, codec: Codec, group: str, algorithm: str) -> int:
    """Check what shapes and names tell, and return the number of ranks."""
    mesh_or_group = _group(group)
    ranks = mesh_or_group.size() if mesh_or_group else dist.get_world_size()
    arguments.fitting(codec, x)
    if algorithm != "hierarchical":
        planner.choose(0, ranks, codec, algorithm=algorithm)
    cols = x.shape[-1] if x.dim() else 1
    if cols:
        codec.check(cols, ranks)
    return ranks


@torch.library.custom_op("flashcomm::all_reduce", mutates_args=())
def _all_reduce(
    x: torch.Tensor, codec: str, group: str, algorithm: str, strict: bool, batch_invariant: bool
) -> torch.Tensor:
    options = {"strict": strict, "batch_invariant": batch_invariant}
    return _run(ALL_REDUCE, x, codec, group, algorithm=algorithm, **options)


@_all_reduce.register_fake
def _(x: torch.Tensor, codec: str, group: str, algorithm: str, strict: bool, batch_invariant: bool) -> torch.Tensor:
    _known(x, codecs.named(codec), group, algorithm)
    return x.new_empty(x.shape)


@torch.library.custom_op("flashcomm::reduce_scatter", mutates_args=())
def _reduce_scatter(
    x: torch.Tensor, codec: str, group: str, input_split_sizes: Sequence[int] | None, algorithm: str
) -> torch.Tensor:
    return _run(REDUCE_SCATTER, x, codec, group, algorithm=algorithm, splits=(input_split_sizes, None))


@_reduce_scatter.register_fake
def _(x: torch.Tensor, codec: str, group: str, input_split_sizes: Sequence[int] | None, algorithm: str) -> torch.Tensor:
    ranks = _known(x, arguments.single_step(codecs.named(codec), 0, algorithm), group, algorithm)
    if input_split_sizes is None:
        return x.new_empty(arguments.part_shape(x.shape, ranks))
    sizes = arguments.split_sizes("input_split_sizes", input_split_sizes, None, ranks)
    return x.new_empty(sizes[group_of(_group(group)).ranks.rank], *x.shape[1:])


@torch.library.custom_op("flashcomm::all_gather", mutates_args=())
def _all_gather(
    x: torch.Tensor, codec: str, group: str, output_split_sizes: Sequence[int] | None, algorithm: str
) -> torch.Tensor:
    return _run(ALL_GATHER, x, codec, group, algorithm=algorithm, splits=(None, output_split_sizes))


@_all_gather.register_fake
def _(
    x: torch.Tensor, codec: str, group: str, output_split_sizes: Sequence[int] | None, algorithm: str
) -> torch.Tensor:
    ranks = _known(x, arguments.single_step(codecs.named(codec), 1, algorithm), group, algorithm)
    if output_split_sizes is None:
        return x.new_empty(arguments.gathered_shape(x.shape, ranks))
    sizes = arguments.split_sizes("output_split_sizes", output_split_sizes, None, ranks)
    return x.new_empty(sum(sizes), *x.shape[1:])


@torch.library.custom_op("flashcomm::all_to_all", mutates_args=())
def _all_to_all(
    x: torch.Tensor,
    codec: str,
    group: str,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
    algorithm: str,
) -> torch.Tensor:
    splits = input_split_sizes, output_split_sizes
    return _run(ALL_TO_ALL, x, codec, group, algorithm=algorithm, splits=splits)


@_all_to_all.register_fake
def _(
    x: torch.Tensor,
    codec: str,
    group: str,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
    algorithm: str,
) -> torch.Tensor:
    ranks = _known(x, arguments.exchangeable(x, codecs.named(codec), algorithm), group, algorithm)
    if output_split_sizes is None:
        output_split_sizes = arguments.split_sizes("output_split_sizes", None, x.shape[0], ranks)
    return x.new_empty(sum(output_split_sizes), *x.shape[1:])


for _verb in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"):
    effects._register_effectful_op(getattr(torch.ops.flashcomm, _verb).default, effects._EffectType.ORDERED)

# What collects the last effect of a graph. Before torch 2.11 inductor takes it for dead code, and with it the calls at
# the end of the graph whose results nobody uses.
has_side_effect(torch.ops.prims._sink_tokens.default)
