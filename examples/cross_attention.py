"""Spread the image tokens of a Mllama (Llama 3.2 Vision; here small and random) over ranks; text is on all of them.

torchrun --standalone --nproc-per-node 2 examples/cross_attention.py
"""

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface, MllamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

import flashcomm

CODEC = "int8g128"


def attend(module, query, key, value, mask, scaling=None, **kwargs):
    """Cross-attention to the image tokens of all ranks; self-attention as it is."""
    if not isinstance(module, MllamaTextCrossAttention):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    out = flashcomm.attention.scaled_dot_product_attention(query, key, value, CODEC, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("spread", attend)
AttentionMaskInterface.register("spread", sdpa_mask)
dist.init_process_group("gloo")
torch.manual_seed(0)
config = MllamaTextConfig(
    vocab_size=256, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=512, cross_attention_layers=[1, 3], pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
model = MllamaForCausalLM(config).eval()
for name, parameter in model.named_parameters():
    if name.endswith("gate"):  # zero in a new model, which would ignore images
        torch.nn.init.ones_(parameter)
text, image = torch.randint(3, 256, (1, 20)), torch.randn(1, 1600, 256)
seen = torch.zeros(1, 1, 20, 1600)
seen[:, :, :8, 800:] = -torch.inf  # of two images, the second follows these words

with torch.inference_mode():
    model.set_attn_implementation("sdpa")
    want = model(text, cross_attention_states=image, cross_attention_mask=seen, use_cache=False).logits
    model.set_attn_implementation("spread")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine, visible = image.tensor_split(ranks, 1)[rank], seen.tensor_split(ranks, 3)[rank]
    got = model(text, cross_attention_states=mine, cross_attention_mask=visible, use_cache=False).logits
if rank == 0:
    error = (got - want).norm() / want.norm()
    print(f"relative error {error:.4f}, sent {flashcomm.stats()['wire_bytes']:,} bytes")
    print(f"keys and values of these two layers: {2 * 2 * image.shape[1] * 2 * 64 * 4:,} bytes")
dist.destroy_process_group()
