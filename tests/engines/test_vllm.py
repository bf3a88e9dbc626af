"""A real vLLM server over two ranks: what it answers with compressed sums, what it counts, and how it ends."""

import http.client
import json
import math
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from server import START_S, Server
from transformers import AutoTokenizer
from vllm.config.compilation import PassConfig

from events import wait_for
from flashcomm.demo import MODEL
from flashcomm.integrations.vllm import adapt_passes
from flashcomm.models import text
from flashcomm.policy import Policy, Rule

ROOT = Path(__file__).parents[2]
# What vLLM imports warns of itself.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
PROMPTS = 64
NEW_TOKENS = 8

# To second order KL is half of the variance of the change of the log-probabilities, so the mean absolute change is at
# most sqrt(2 KL). Of int8g128 over 2 ranks, all sums compressed, results/demo_tp2_cpu.json has the KL.
KL = next(
    row["kl"]
    for row in json.loads((ROOT / "results" / "demo_tp2_cpu.json").read_text())["rows"]
    if row["codec"] == "int8g128"
)
MEAN_LOGPROB_CHANGE = math.sqrt(2 * KL)

EAGER_POLICY = """
codec = "int8g128"
min_bytes = 4096
algorithm = "one_step"
"""
LAYERS_POLICY = """
codec = "none"
min_bytes = 4096
algorithm = "one_step"
[[layers]]
match = "model.layers.[0-3].*"
codec = "int8g128"
[[layers]]
match = "model.layers.*.mlp.down_proj"
codec = "int6g128"
"""


def tokens() -> list[int]:
    """Text that the model has not seen."""
    ids = AutoTokenizer.from_pretrained(MODEL)(text.held_out_files()[0].read_text(), verbose=False)["input_ids"]
    assert len(ids) > 4000
    return ids


def lengths() -> list[int]:
    """Tokens of each prompt: 1 to 1,500."""
    return [1, 2, 1500, *(16 + (n * 397) % 500 for n in range(PROMPTS - 3))]


def prompts() -> list[list[int]]:
    """Held-out text."""
    ids = tokens()
    return [ids[37 * n : 37 * n + length] for n, length in enumerate(lengths())]


def greedy(server: Server, some: list[list[int]], concurrent: int = 8) -> list[str]:
    with ThreadPoolExecutor(concurrent) as pool:
        return list(pool.map(lambda prompt: server.complete(prompt, max_tokens=NEW_TOKENS)["text"], some))


def logprobs(server: Server, prompt: list[int]) -> list[float]:
    """Of the prompt's own tokens after the first."""
    choice = server.complete(prompt, max_tokens=1, echo=True, logprobs=0)
    return choice["logprobs"]["token_logprobs"][1 : len(prompt)]


def compressed_calls(stats: dict) -> int:
    return sum(count for call, count in stats["calls"].items() if "/int" in call)


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory):
    """What vLLM answers without us, in fp32: with 16 bits another order of the sums changes more than int8 does."""
    with Server(tmp_path_factory.mktemp("vanilla") / "log", "--enforce-eager", dtype="float32") as server:
        ids = tokens()
        return {
            "texts": greedy(server, prompts()),
            "logprobs": [logprobs(server, ids[start : start + 512]) for start in (0, 1000, 2000)],
            "metrics": server.ask("/metrics"),
            "printed": server.printed(),
        }


@pytest.fixture(scope="module")
def eager(tmp_path_factory, vanilla):
    folder = tmp_path_factory.mktemp("eager")
    (folder / "policy.toml").write_text(EAGER_POLICY)
    env = {"FLASHCOMM_POLICY": str(folder / "policy.toml")}
    with Server(folder / "log", "--enforce-eager", dtype="float32", env=env) as server:
        server.on_workers("flashcomm_watch")
        yield server


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "policy.toml").write_text(LAYERS_POLICY)
    option = json.dumps({"flashcomm": str(folder / "policy.toml")})
    with Server(folder / "log", "--additional-config", option, dtype="float32") as server:
        server.on_workers("flashcomm_watch")
        yield server


def test_off_unless_asked_for(vanilla):
    assert "flashcomm compresses" not in vanilla["printed"]
    assert "flashcomm_" not in vanilla["metrics"]


def test_greedy_text_is_plains(vanilla, eager):
    eager.on_workers("flashcomm_stats")
    got = greedy(eager, prompts())
    same = sum(ours == theirs for ours, theirs in zip(got, vanilla["texts"], strict=True))
    assert same >= 0.95 * PROMPTS
    first, second = eager.on_workers("flashcomm_stats")
    assert compressed_calls(first) == compressed_calls(second) > 0
    assert 0 < first["wire_bytes"] < 0.27 * first["plain_bytes"]
    assert first["plain"]["decode step"] > 0


def test_logprobs_are_close_to_plains(vanilla, eager):
    ids = tokens()
    changes = [
        abs(ours - theirs)
        for start, plain in zip((0, 1000, 2000), vanilla["logprobs"], strict=True)
        for ours, theirs in zip(logprobs(eager, ids[start : start + 512]), plain, strict=True)
    ]
    assert 0 < sum(changes) / len(changes) <= MEAN_LOGPROB_CHANGE


def requests_of_all_kinds(server: Server):
    """Completions and chats, at once and streamed, 16 at a time."""

    def chat(prompt: str):
        body = {"model": "demo", "messages": [{"role": "user", "content": prompt}], "max_tokens": NEW_TOKENS}
        return server.ask("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def stream(prompt: str):
        return "".join(server.stream(prompt, max_tokens=NEW_TOKENS))

    kinds = (chat, stream, lambda prompt: server.complete(prompt, max_tokens=NEW_TOKENS)["text"])
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(kinds[n % 3], "def read(path):\n    " * (1 + n % 50)) for n in range(48)]
        assert all(isinstance(answer.result(), str) for answer in answers)


def test_every_kind_of_request(eager):
    requests_of_all_kinds(eager)
    assert all(compressed_calls(stats) > 0 for stats in eager.on_workers("flashcomm_stats"))


def test_workers_get_the_same_sums(eager):
    first, second = eager.on_workers("flashcomm_digest")
    assert first == second


def test_says_what_it_does(eager):
    line = next(line for line in eager.printed().splitlines() if "flashcomm compresses" in line)
    assert "int8g128" in line and "prefill" in line and "from 4 KiB" in line and "2 ranks over shared memory" in line


def test_metrics(eager):
    eager.complete(prompts()[2], max_tokens=2)
    expected = {
        "flashcomm_calls_total": 'call="all_reduce/one_step/int8g128",rank="{}"',
        "flashcomm_saved_bytes_total": 'rank="{}"',
        "flashcomm_plain_total": 'rank="{}",reason="message under the policy\'s min_bytes = 4 KiB"',
    }
    for name, labels in expected.items():
        for rank in (0, 1):
            # Workers write once a second.
            sample = "{" + labels.format(rank) + "}"
            wait_for(lambda name=name, sample=sample: eager.metrics(name).get(sample), 30)


def ended(requests: list[Future]) -> list[Future]:
    """The requests, each of which must have an answer or an error within a minute."""
    _, late = wait(requests, 60)
    assert not late
    return requests


def lose_a_worker(server: Server):
    """Requests under way fail, and the server says why and ends."""
    server.on_workers("flashcomm_die", 20)
    streams = [server.stream(prompt, max_tokens=1500, ignore_eos=True) for prompt in prompts()[3:7]]
    with ThreadPoolExecutor(len(streams)) as pool:
        for request in ended([pool.submit(list, stream) for stream in streams]):
            # A server that dies ends a stream by an event of another form, or by the connection.
            with pytest.raises((OSError, KeyError, http.client.HTTPException)):
                request.result()
    # With status 0, as vLLM does.
    server.process.wait(60)
    assert "EngineDeadError" in server.printed()


def test_a_lost_worker_ends_the_server(eager):
    lose_a_worker(eager)


def test_compiled_with_a_policy_for_some_layers(compiled):
    some = prompts()
    compiled.on_workers("flashcomm_from", 2**40)
    plain = greedy(compiled, some)
    compiled.on_workers("flashcomm_from", 4096)
    compiled.on_workers("flashcomm_stats")
    got = greedy(compiled, some)
    assert sum(ours == theirs for ours, theirs in zip(got, plain, strict=True)) >= 0.95 * PROMPTS
    first, second = compiled.on_workers("flashcomm_stats")
    assert first["calls"] == second["calls"]
    # Of 17 sums of a prompt 8 are of the first four layers, 4 are other down projections, and 5 are plain.
    eights, sixes = (first["calls"][f"all_reduce/one_step/int{bits}g128"] for bits in (8, 6))
    assert eights == 2 * sixes > 0
    assert first["plain"]["codec none"] * 4 == 5 * sixes
    requests_of_all_kinds(compiled)
    digests = compiled.on_workers("flashcomm_digest")
    assert digests[0] == digests[1]


def test_a_lost_worker_ends_the_compiled_server(compiled):
    lose_a_worker(compiled)


def test_a_wrong_policy_ends_the_command_before_weights_are_loaded(tmp_path):
    (tmp_path / "policy.toml").write_text('codec = "int8g128"\nmin_byte = 5\n')
    server = Server(tmp_path / "log", "--enforce-eager", env={"FLASHCOMM_POLICY": str(tmp_path / "policy.toml")})
    server.start()
    try:
        assert server.process.wait(START_S) != 0
    finally:
        server.stop()
    assert "unknown key min_byte. Did you mean min_bytes?" in server.printed()
    assert "Loading" not in server.printed()


def test_without_a_wish_nothing_is_imported_or_replaced():
    code = """
import sys
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.worker_base import WorkerBase
own = EngineArgs.create_engine_config, WorkerBase.__init__, GroupCoordinator.all_reduce
before = set(sys.modules)
from flashcomm.integrations import vllm
vllm.register()
vllm.register()
added = {name.split(".")[0] for name in set(sys.modules) - before}
assert not added & {"numba", "triton", "prometheus_client", "matplotlib", "typer"}, added
assert GroupCoordinator.all_reduce is own[2]
assert EngineArgs.create_engine_config.__wrapped__ is own[0]
vllm.undo()
assert own == (EngineArgs.create_engine_config, WorkerBase.__init__, GroupCoordinator.all_reduce)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "policy, largest_mb, limit_mb, fused",
    [
        (Policy(min_bytes=2**20), 64, 1, True),
        (Policy(min_bytes=2**27), 64, 64, True),
        (Policy(layers=(Rule(match="*", codec="int4g128"),)), 64, 64, False),
    ],
)
def test_the_compiler_leaves_us_the_sums_to_compress(policy, largest_mb, limit_mb, fused):
    passes = PassConfig(fuse_allreduce_rms=True, fi_allreduce_fusion_max_size_mb=largest_mb)
    adapt_passes(passes, policy, 2)
    assert passes.fi_allreduce_fusion_max_size_mb == limit_mb
    assert passes.fuse_allreduce_rms is fused
