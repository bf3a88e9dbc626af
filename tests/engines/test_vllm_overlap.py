"""vLLM's steps in parts that take turns: the same answers as in one piece, counts, and an end without a hang.

One server, without compression, so that parts and one piece compute the same values.
"""

import http.client
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from server import Server
from test_vllm import ended, greedy, logprobs, tokens

from events import wait_for

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
# Shared beginnings hit the prefix cache, also within one step; others are cut inside, as 512 tokens make a step.
LENGTHS = (700, 130, 1, 320, 40, 900, 260, 150)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    arguments = ["--enforce-eager", "--enable-prefix-caching", "--max-num-batched-tokens", "512"]
    env = {"FLASHCOMM_OVERLAP": "2"}
    with Server(tmp_path_factory.mktemp("overlap") / "log", *arguments, dtype="float32", env=env) as server:
        yield server


def prompts() -> list[list[int]]:
    ids = tokens()
    return [ids[:300] + ids[37 * n : 37 * n + length] for n, length in enumerate(LENGTHS)]


def answers(server: Server, overlap) -> tuple[list[str], list[float], list[dict]]:
    """Texts of prompts at once, and log-probabilities, with an empty prefix cache at first; and the workers' counts."""
    server.ask("/reset_prefix_cache", {})
    server.on_workers("flashcomm_overlap", overlap)
    server.on_workers("flashcomm_stats")
    texts = greedy(server, prompts())
    return texts, logprobs(server, tokens()[1000:1900]), server.on_workers("flashcomm_stats")


def in_parts(stats: dict, parts: int) -> int:
    return stats["prefills"].get(f"{parts} parts", 0)


def test_answers_are_those_of_one_piece(server):
    whole, plain, (first, second) = answers(server, "off")
    assert set(first["prefills"]) <= {"in one piece: asked for", "in one piece: fewer than 128 tokens"}
    for parts in (2, 3):
        texts, changed, (first, second) = answers(server, parts)
        assert texts == whole
        # Matrix products of fewer rows may add up in another order: 2.4e-6 in fp32 on an AMD EPYC, 2026-11-28.
        assert max(abs(one - other) for one, other in zip(changed, plain, strict=True)) < 1e-4
        assert first["prefills"] == second["prefills"]
        assert in_parts(first, parts) >= 5
        assert first["plain"] == second["plain"]


def test_auto_leaves_one_host_alone(server):
    _, _, (first, _) = answers(server, "auto")
    why = "in one piece: vLLM's sums over shared memory take the cores, so nothing can compute meanwhile"
    assert first["prefills"][why] >= 5


def test_metrics(server):
    server.ask("/reset_prefix_cache", {})
    server.on_workers("flashcomm_overlap", 2)
    server.complete(prompts()[0], max_tokens=1)
    for rank in (0, 1):
        sample = f'{{how="2 parts",rank="{rank}"}}'
        wait_for(lambda sample=sample: server.metrics("flashcomm_prefills_total").get(sample), 30)


def test_a_worker_lost_in_the_middle_of_parts_is_an_error(server):
    # What the cache has left of a prompt may be too short for parts.
    server.ask("/reset_prefix_cache", {})
    server.on_workers("flashcomm_overlap", 2)
    server.on_workers("flashcomm_die_in_a_part", 11)
    with ThreadPoolExecutor(4) as pool:
        for answer in ended([pool.submit(server.complete, prompt, max_tokens=8) for prompt in prompts()[:4]]):
            with pytest.raises((OSError, http.client.HTTPException)):
                answer.result()
    server.process.wait(60)
    assert "EngineDeadError" in server.printed()


def test_a_compiled_engine_runs_steps_in_parts(tmp_path):
    """Parts run without the compiled graph, which all other steps keep."""
    arguments = ["--max-num-batched-tokens", "512"]
    with Server(tmp_path / "log", *arguments, dtype="float32", env={"FLASHCOMM_OVERLAP": "2"}) as server:
        whole, plain, _ = answers(server, "off")
        texts, changed, (first, second) = answers(server, 2)
        assert texts == whole
        # Operators that are fused round in other places.
        assert max(abs(one - other) for one, other in zip(changed, plain, strict=True)) < 1e-4
        assert first["prefills"] == second["prefills"]
        assert in_parts(first, 2) >= 5


def test_off_replaces_nothing_of_steps():
    code = """
from types import SimpleNamespace
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner
own = Runner._model_forward, Runner._build_attention_metadata
from flashcomm.integrations import vllm
from flashcomm.policy import Policy
config = VllmConfig()
config.model_config = SimpleNamespace(
    is_encoder_decoder=False, is_multimodal_model=False, is_hybrid=False, is_attention_free=False,
    get_hidden_size=lambda: 64,
)
vllm.install(Policy(), config, 0)
assert vllm.worker.overlap is None
assert own == (Runner._model_forward, Runner._build_attention_metadata)
vllm.undo()
vllm.install(Policy(overlap="auto"), config, 0)
assert Runner._model_forward is not own[0] and Runner._build_attention_metadata is not own[1]
vllm.undo()
assert own == (Runner._model_forward, Runner._build_attention_metadata)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
