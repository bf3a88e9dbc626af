"""Compress the all-gather and the reduce-scatter of an MLP in sequence parallelism.

torchrun --standalone --nproc-per-node 2 examples/dtensor.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, parallel

import flashcomm
from flashcomm.integrations.dtensor import ColwiseParallel, RowwiseParallel


def mlp(up: parallel.ParallelStyle, down: parallel.ParallelStyle) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
    return parallel.parallelize_module(layers, mesh, {"0": up, "2": down})


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
sequence = Shard(1)
plain = mlp(parallel.ColwiseParallel(input_layouts=sequence), parallel.RowwiseParallel(output_layouts=sequence))
compressed = mlp(
    ColwiseParallel(codec="int8g128", input_layouts=sequence),
    RowwiseParallel(codec="int8g128", output_layouts=sequence),
)

torch.manual_seed(dist.get_rank())
x = torch.randn(1, 256, 512)  # this rank's tokens
with torch.no_grad():
    want, got = plain(x), compressed(x)
    error = (got - want).norm() / want.norm()

if dist.get_rank() == 0:
    stats = flashcomm.stats()
    print(f"relative error {error:.4f}")
    print(f"sent {stats['wire_bytes']:,} bytes instead of {stats['plain_bytes']:,} in {stats['calls']}")

dist.destroy_process_group()
