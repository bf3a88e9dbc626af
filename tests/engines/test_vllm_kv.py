"""Prompts that one vLLM process prefills and another one decodes, through `flashcomm.integrations.vllm_kv`."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from flashcomm import kv
from flashcomm.demo import MODEL
from flashcomm.models import text

# What vLLM imports warns of itself.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
BLOCK = 128
LENGTHS = (100, 300, 641, 1200)
"""Tokens of prompts: less than a block, some blocks, whole blocks and a token, and one computed in parts."""
NEW_TOKENS = 8


def prompts() -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(MODEL)(text.held_out_files()[0].read_text(), verbose=False)["input_ids"]
    return [ids[100 * number :][:length] for number, length in enumerate(LENGTHS)]


def process(role: str, store: str, **more) -> list[dict]:
    """What a vLLM process answers."""
    transfer = {
        "kv_connector": "CompressedConnector",
        "kv_connector_module_path": "flashcomm.integrations.vllm_kv",
        "kv_role": role,
        "kv_connector_extra_config": {"store": store, "codec": "lossless"},
        **more,
    }
    job = {"transfer": transfer, "prompts": prompts(), "new_tokens": NEW_TOKENS}
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("kv_process.py")), json.dumps(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("answers: ")]
    return json.loads(line.removeprefix("answers: "))


def test_what_one_process_prefills_another_one_decodes(tmp_path):
    computed = process("kv_producer", str(tmp_path))
    assert [one["cached"] for one in computed] == [0] * len(LENGTHS)
    stored = [folder for folder in tmp_path.iterdir() if (folder / "0.whole").is_file()]
    assert len(stored) == 3
    files = [path for folder in stored for path in folder.glob("0.*.kv")]
    assert len(files) == 3 * 8
    assert not list(tmp_path.rglob("*.part"))
    assert all(10 < kv.bits_per_value(path.read_bytes()) < 13 for path in files)
    # One file is damaged: its prompt is computed, and no other.
    longest = max(stored, key=lambda folder: sum(path.stat().st_size for path in folder.iterdir()))
    damaged = min(longest.glob("0.*.kv"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    # Over HTTP, as from another host.
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        decoded = process("kv_consumer", url, kv_load_failure_policy="recompute")
        server.shutdown()
    assert [one["cached"] for one in decoded][:3] == [0, 256, 640]
    # Fewer tokens at a time are multiplied in another order, so a tie may fall to the other side.
    assert sum(ours["tokens"] == theirs["tokens"] for ours, theirs in zip(decoded, computed, strict=True)) >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_the_cpu_attention_become_tokens_and_blocks_again(dtype):
    import vllm._custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from flashcomm.integrations.vllm_kv import from_blocks, to_blocks

    isa = _get_attn_isa(dtype, BLOCK, 64)
    cache = torch.zeros(5, 3, BLOCK, 2 * 64, dtype=dtype)
    k, v = torch.randn(2, 2 * BLOCK, 3, 64).to(dtype)
    slots = torch.cat([torch.arange(BLOCK) + 3 * BLOCK, torch.arange(BLOCK) + BLOCK])
    ops.cpu_attn_reshape_and_cache(k, v, *cache.view(5, 3, 2 * BLOCK, 64).chunk(2, 2), slots, isa)
    found = from_blocks(cache[[3, 1]], isa)
    assert torch.equal(found.k, k.transpose(0, 1))
    assert torch.equal(found.v, v.transpose(0, 1))
    assert torch.equal(to_blocks(*found, BLOCK, isa), cache[[3, 1]])
