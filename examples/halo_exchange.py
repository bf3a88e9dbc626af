"""Train a graph network that is spread over ranks; the codec of features from other ranks gets finer with time.

torchrun --standalone --nproc-per-node 2 examples/halo_exchange.py

Source: variable-rate compression of boundary activations (arXiv 2406.17611); the schedule here is our own.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import flashcomm

NODES, CLASSES, WIDTH, EPOCHS = 240, 4, 32, 40
SCHEDULE = ("int2g32+spike", "int4g32", "int8g32", "fp32")


class Halo(torch.autograd.Function):
    """Rows of other ranks' nodes; backward, the gradients go home in the same codec."""

    @staticmethod
    def forward(ctx, x, codec):
        """Send x's rows that each rank needs, and receive those that this rank needs."""
        ctx.codec, ctx.rows = codec, len(x)
        splits = {"input_split_sizes": [len(s) for s in sent], "output_split_sizes": [len(c) for c in come]}
        return flashcomm.all_to_all(x[torch.cat(sent)], codec, **splits)

    @staticmethod
    def backward(ctx, grad):
        """Return gradients to the ranks whose rows they are, and add them up."""
        splits = {"input_split_sizes": [len(c) for c in come], "output_split_sizes": [len(s) for s in sent]}
        home = flashcomm.all_to_all(grad.contiguous(), ctx.codec, **splits)
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_add_(0, torch.cat(sent), home), None


def train(codecs):
    torch.manual_seed(0)
    weights = [torch.randn(2 * WIDTH, n).mul_(0.1).requires_grad_() for n in (WIDTH, CLASSES)]
    optimizer = torch.optim.Adam(weights, 0.02)
    for epoch in range(EPOCHS):
        x = features[mine]
        for layer, weight in enumerate(weights):
            halo = Halo.apply(x, codecs[epoch * len(codecs) // EPOCHS])
            x = torch.cat([x, inside @ x + outside @ halo], 1) @ weight
            x = F.relu(x) if layer == 0 else x
        loss = F.cross_entropy(x, labels[mine], reduction="sum") / NODES
        optimizer.zero_grad()
        loss.backward()
        for weight in weights:
            dist.all_reduce(weight.grad)
        optimizer.step()
    right = (x.argmax(1) == labels[mine]).sum().float()
    dist.all_reduce(right)
    return right.item() / NODES


dist.init_process_group("gloo")
rank, parts = dist.get_rank(), torch.arange(NODES).tensor_split(dist.get_world_size())
mine = parts[rank]
torch.manual_seed(0)
labels = torch.randint(CLASSES, (NODES,))
features = F.one_hot(labels, WIDTH) * 1.0 + 1.5 * torch.randn(NODES, WIDTH)
linked = torch.rand(NODES, NODES) < torch.where(labels[:, None] == labels, 0.08, 0.01)
linked |= linked.T.clone()
means = linked / linked.sum(1, keepdim=True).clamp(min=1)
# My nodes that each rank's nodes are linked to, and each rank's nodes that mine are linked to; none of my own.
sent = [(linked[theirs][:, mine].any(0) & (r != rank)).nonzero()[:, 0] for r, theirs in enumerate(parts)]
come = [theirs[linked[mine][:, theirs].any(0) & (r != rank)] for r, theirs in enumerate(parts)]
inside, outside = means[mine][:, mine], means[mine][:, torch.cat(come)]
for name, codecs in {"fp32": ["fp32"], "int2 to fp32": SCHEDULE, "int2g32+spike": SCHEDULE[:1]}.items():
    flashcomm.reset_stats()
    accuracy, sent_bytes = train(codecs), flashcomm.stats()["wire_bytes"]
    if rank == 0:
        print(f"{name:>14}: accuracy {accuracy:.3f}, {sent_bytes:,} bytes sent")
dist.destroy_process_group()
