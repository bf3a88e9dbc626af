"""DeMo's optimiser: ranks exchange the largest DCT components of momenta. Run: torchrun --nproc-per-node 2 FILE."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

import flashcomm


@dataclass(frozen=True)
class DctTopK(flashcomm.Codec):
    """The `keep` largest components of the cosine transform of a row of at most 256 values: a byte and a bf16 each."""

    keep: int = 8

    def __str__(self):
        return f"dct_top{self.keep}"

    def payload_bytes(self, cols, dtype=torch.bfloat16):
        return 3 * self.keep

    def transform(self, cols):
        k, i = torch.meshgrid(torch.arange(cols), torch.arange(cols), indexing="ij")
        return torch.cos(torch.pi * (2 * i + 1) * k / (2 * cols)) * torch.where(k == 0, 1, 2**0.5) / cols**0.5

    def encode(self, x):
        components = x.float() @ self.transform(x.shape[1]).T
        places = components.abs().topk(self.keep).indices
        return torch.cat([places.byte(), components.gather(1, places).bfloat16().view(torch.uint8)], 1)

    def decode(self, payload, cols, dtype):
        values = payload[:, self.keep :].contiguous().view(torch.bfloat16).float()
        components = torch.zeros(len(payload), cols).scatter_(1, payload[:, : self.keep].long(), values)
        return (components @ self.transform(cols)).to(dtype)

    def step(self, x):
        return 2 * (self.decode(self.encode(x), x.shape[1], torch.float32) - x.float()).abs()


class DeMo(torch.optim.Optimizer):
    """Algorithm 1 of DeMo (arXiv 2411.19870): what a rank sends leaves its momentum; the sum's sign is the step."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).mul_(group["decay"]).add_(p.grad)
                rows = momentum.view(-1, group["chunk"])
                total = flashcomm.all_reduce(rows, group["codec"], algorithm="one_step")
                rows -= group["codec"].decode(group["codec"].encode(rows), rows.shape[1], rows.dtype)
                p -= group["lr"] * total.sign().view_as(p)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    target, model = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    optimizer = DeMo(model.parameters(), dict(lr=0.003, decay=0.999, chunk=64, codec=DctTopK()))
    torch.manual_seed(1 + dist.get_rank())  # each rank has data of its own
    for step in range(100):
        x = torch.randn(256, 64)
        loss = torch.nn.functional.mse_loss(model(x), target(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 33 == 0:
            print(f"step {step}: loss {loss:.4f}")
    if dist.get_rank() == 0:
        stats = flashcomm.stats()
        fewer = stats["plain_bytes"] / stats["wire_bytes"]
        print(f"sent {stats['wire_bytes']:,} bytes, {fewer:.1f} times fewer than plain")
    dist.destroy_process_group()
