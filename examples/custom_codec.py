"""Write a wire format: one bit per value, and the row's mean magnitude. Run: torchrun --nproc-per-node 2 FILE."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

import flashcomm
from flashcomm.codecs import bits


@dataclass(frozen=True)
class Sign(flashcomm.Codec):
    """The sign of each value. An entry point under flashcomm.codecs names this class for the CLI and for policies."""

    def __str__(self):
        return "sign"

    def payload_bytes(self, cols, dtype=torch.bfloat16):
        return bits.code_bytes(cols, 1) + 4

    def encode(self, x):
        mean = x.float().abs().mean(1, keepdim=True)
        return torch.cat([bits.pack((x < 0).int(), 1), mean.view(torch.uint8)], 1)

    def decode(self, payload, cols, dtype):
        negative, mean = bits.unpack(payload[:, :-4], cols, 1), payload[:, -4:].contiguous().view(torch.float32)
        return (mean - 2 * mean * negative).to(dtype)

    def step(self, x):
        return 2 * (x.float().abs() - x.float().abs().mean(1, keepdim=True)).abs()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    x = torch.randn(512, 4096, generator=torch.Generator().manual_seed(dist.get_rank()))
    # Two ranks of one host would send values uncompressed, which is faster, if the algorithm were left to `auto`.
    y, exact = flashcomm.all_reduce(x, Sign(), algorithm="one_step"), flashcomm.all_reduce(x, "fp32")
    if dist.get_rank() == 0:
        bits_per_value = Sign().bits_per_value(4096)
        print(f"{bits_per_value:.2f} bits per value, relative error {(y - exact).norm() / exact.norm():.2f}")
    dist.destroy_process_group()
