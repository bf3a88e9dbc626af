"""Which steps of vLLM run in one piece, on stand-ins for its objects; tests/engines runs a real server."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flashcomm.integrations.vllm_overlap import never
from flashcomm.integrations.vllm_steps import Step
from flashcomm.parts.planned import Refused

BLOCK = 4


def step(*requests):
    """A step of requests, each of tokens, tokens computed before, and its blocks."""
    scheduled = {str(n): tokens for n, (tokens, _, _) in enumerate(requests)}
    table = np.zeros((8, 8), dtype=np.int32)
    for row, (_, _, blocks) in zip(table, requests, strict=False):
        row[: len(blocks)] = blocks
    group = SimpleNamespace(block_size=BLOCK, get_numpy_array=lambda: table)
    batch = SimpleNamespace(
        num_computed_tokens_cpu=np.array([computed for _, computed, _ in requests]),
        req_ids=list(scheduled),
        block_table=SimpleNamespace(block_tables=[group]),
    )
    runner = SimpleNamespace(device=torch.device("cpu"), input_batch=batch)
    arguments = {"num_scheduled_tokens": scheduled, "num_reqs": len(requests)}
    return Step(None, runner, None, None, {}, torch.arange(sum(scheduled.values())), None, None, arguments)


def test_a_reader_waits_for_no_later_part():
    """The second request hits blocks 1 and 2, which the first one computes in this step."""
    writer, reader = (10, 0, (1, 2, 3)), (6, 8, (1, 2, 4, 5))
    # The writer comes first: its part leads, or writes all before the reader's part reads.
    for size in range(1, 16):
        step(writer, reader).check((size, 16 - size))
    # The reader comes first: only parts that begin with the reader's last token or later leave it behind the writer.
    for size in range(1, 14):
        with pytest.raises(Refused, match="a prefix that a later request of the same step computes"):
            step(reader, writer).check((size, 16 - size))
    # The last cut leaves blocks 1 and 2 in the first part.
    for size in (14, 15):
        step(reader, writer).check((size, 16 - size))


def test_own_keys_and_earlier_steps_keys_are_no_conflict():
    chunk, decode, prompt = (7, 9, (1, 2, 3, 4)), (1, 21, (5, 6, 7, 8, 9, 10)), (12, 0, (11, 12, 13))
    for first in range(1, 18):
        step(decode, chunk, prompt).check((first, 20 - first))


def config(**changes):
    parallel = SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1, enable_expert_parallel=False)
    model = SimpleNamespace(
        is_encoder_decoder=False, is_multimodal_model=False, is_hybrid=False, is_attention_free=False
    )
    names = {"speculative_config": None, "lora_config": None, "kv_transfer_config": None}
    made = SimpleNamespace(parallel_config=parallel, model_config=model, use_v2_model_runner=False, **names)
    for name, value in changes.items():
        owner = next(one for one in (made, parallel, model) if hasattr(one, name))
        setattr(owner, name, value)
    return made


def test_engines_of_which_no_step_is_cut():
    assert never(config()) == ""
    for change, why in (
        ({"use_v2_model_runner": True}, "vLLM's V2 model runner"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"lora_config": object(), "is_hybrid": True}, "LoRA, layers with a state"),
    ):
        assert never(config(**change)) == why
