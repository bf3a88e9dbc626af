"""Compress the all-reduces of a tensor-parallel transformers model.

torchrun --standalone --nproc-per-node 2 examples/compress_transformers.py [MODEL_DIRECTORY]
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashcomm
from flashcomm.demo import MODEL
from flashcomm.integrations.transformers import compressed, tensor_parallel_argument

dist.init_process_group("gloo")
directory = sys.argv[1] if len(sys.argv) > 1 else MODEL
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **tensor_parallel_argument())
tokenizer = AutoTokenizer.from_pretrained(directory)
inputs = tokenizer("def read_config(path):\n" * 30, return_tensors="pt", return_token_type_ids=False)

with compressed(model, "int8g128"), torch.inference_mode():
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)

if dist.get_rank() == 0:
    print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
    stats = flashcomm.stats()
    print(f"sent {stats['wire_bytes']:,} bytes instead of {stats['plain_bytes']:,}; plain: {stats['plain']}")

dist.destroy_process_group()
