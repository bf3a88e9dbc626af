"""Sum a tensor over ranks in 4 to 8 bits, and print the error and the share of the bytes.

torchrun --standalone --nproc-per-node 2 examples/all_reduce.py
"""

import torch
import torch.distributed as dist

import flashcomm

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
x = torch.randn(1024, 4096, dtype=torch.bfloat16)

exact = x.float()
dist.all_reduce(exact)

for codec in ("int8g128", "int5g128", "int4g32", "int4g128:int8g128"):
    flashcomm.reset_stats()
    y = flashcomm.all_reduce(x, codec)
    if dist.get_rank() == 0:
        error = (y.float() - exact).norm() / exact.norm()
        stats = flashcomm.stats()
        share = stats["wire_bytes"] / stats["plain_bytes"]
        print(f"{codec:>18}: relative error {error:.4f}, {share:.0%} of the bytes, {next(iter(stats['calls']))}")

dist.destroy_process_group()
