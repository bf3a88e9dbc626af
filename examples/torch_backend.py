"""Compress the large sums of a torch program by the name of its backend.

FLASHCOMM_CODEC=int8g128 torchrun --standalone --nproc-per-node 2 examples/torch_backend.py
"""

import torch
import torch.distributed as dist

import flashcomm
from flashcomm.policy import Policy

# If FLASHCOMM_CODEC or FLASHCOMM_POLICY is set, you can leave pg_options out. Ranks of one host share memory, where
# `auto` would send the values uncompressed.
policy = Policy(codec="int8g128", algorithm="two_step")
dist.init_process_group("flashcomm", pg_options=policy)
rank = dist.get_rank()
torch.manual_seed(rank)

activations, loss, count = torch.randn(512, 2048), torch.rand(1), torch.tensor([rank])
exact = activations.double()
for tensor in (activations, loss, count, exact):
    dist.all_reduce(tensor)

if rank == 0:
    error = (activations - exact).norm() / exact.norm()
    stats = flashcomm.stats()
    print(f"relative error {error:.4f} at {stats['wire_bytes'] / stats['plain_bytes']:.0%} of the bytes")
    print(f"compressed: {stats['calls']}; as they were: {stats['plain']}")

dist.destroy_process_group()
