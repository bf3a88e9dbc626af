"""Decode with the bundled model while its cache of keys and values is spread over ranks, each position on one.

torchrun --standalone --nproc-per-node 4 examples/context_parallel.py
"""

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

import flashcomm
from flashcomm.demo import MODEL


class Share(DynamicLayer):
    """The positions p of a layer with p mod R = rank; `seen` counts those of all ranks."""

    seen = 0

    def update(self, key, value, *args, **kwargs):
        """Keep this rank's part of the new positions, and return all that it has."""
        mine = slice((dist.get_rank() - self.seen) % dist.get_world_size(), None, dist.get_world_size())
        self.seen += key.shape[2]
        return super().update(key[:, :, mine], value[:, :, mine], *args, **kwargs)

    def get_seq_length(self):
        """Positions of all ranks: where the next token stands."""
        return self.seen


def attend(module, query, key, value, mask, scaling=None, **kwargs):
    """Attend to the positions of all ranks up to the query's own."""
    seen = cache.layers[module.layer_idx].seen
    queries = torch.arange(seen - query.shape[2], seen)[:, None]
    keys = dist.get_rank() + dist.get_world_size() * torch.arange(key.shape[2])
    visible = keys <= queries
    out = flashcomm.attention.scaled_dot_product_attention(query, key, value, codec, attn_mask=visible, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("spread", attend)
AttentionMaskInterface.register("spread", lambda *args, **kwargs: None)
dist.init_process_group("gloo")
model, tokenizer = (
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
    AutoTokenizer.from_pretrained(MODEL),
)
inputs = tokenizer("def read_config(path):\n" * 8, return_tensors="pt", return_token_type_ids=False)
options = {"max_new_tokens": 24, "do_sample": False}
want = model.generate(**inputs, **options)
model.set_attn_implementation("spread")
for codec in ("fp32", "int8g128"):
    cache = Cache(layer_class_to_replicate=Share)
    got = model.generate(**inputs, **options, past_key_values=cache)
    if dist.get_rank() == 0:
        kept, same = cache.layers[0].keys.shape[2], bool(torch.equal(got, want))
        print(f"{codec}: {kept} of {cache.layers[0].seen} positions on this rank, same text as alone: {same}")
dist.destroy_process_group()
