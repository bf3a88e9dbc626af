"""The command as a user runs it: real ranks and real signals.

Where nothing depends on a process of its own, the command runs in that of the tests, which has imported what it needs.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from events import wait_for, wait_until_ended
from flashcomm.cli import app, base
from flashcomm.demo import MODEL
from flashcomm.lab import hosts as lab
from flashcomm.lab import launch
from flashcomm.models.text import held_out_text

pytestmark = pytest.mark.usefixtures("forked_launch")
COMMAND = [sys.executable, "-m", "flashcomm.cli"]


def alone(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=200)


def run(*arguments):
    """The same in this process; what ranks print is not in the result."""
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        return CliRunner().invoke(app, [*map(str, arguments)])
    finally:
        # torch's launcher keeps its own.
        for number, handler in handlers.items():
            signal.signal(number, handler)


_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def descendants(pid: int) -> set[int]:
    """Process ids below `pid`, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found, frontier = set(), {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found |= frontier
    return found


def test_version_and_help():
    from flashcomm import __version__

    assert alone("--version").stdout.strip() == __version__
    text = run("--help").stdout
    for command in ("demo", "generate", "calibrate", "bench", "lab", "env"):
        assert command in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--codecs", "int9"), "unknown codec 'int9'. Did you mean int8g64? Allowed: none, bf16"),
        (("generate", "demo", "--codec", "int9"), "unknown codec 'int9'"),
        (("bench", "codec", "--codecs", "int9"), "unknown codec 'int9'"),
        (
            ("generate", "no/such/model"),
            "no model in 'no/such/model': a Hugging Face model directory has a config.json",
        ),
        (("demo", "--model", "no/such/model"), "no model in"),
        (("generate", "demo", "--tp", "3"), "--tp 3 does not divide the 8 attention heads and 8 key/value heads"),
        (("demo", "--tp", "3"), "Allowed: 1, 2, 4, 8"),
        (("demo", "--algorithm", "ring"), "unknown algorithm 'ring'. Allowed: auto, one_step, two_step, hierarchical"),
        (("generate", "demo", "--codec", "int4:int8", "--algorithm", "one_step"), "one_step sends once"),
        (("bench", "codec", "--codecs", "int4:int8"), "is a pair of formats: measure its steps, int4g128 and int8g128"),
        (("generate", "demo", "--codec", "int8,int4"), "give one codec"),
        (("generate", "demo", "--codec", "int4+keep64"), "needs --calibration FILE"),
        (("generate", "demo", "--codec", "int4+keep64", "--calibration", "none"), "cannot read the calibration 'none'"),
        (("bench", "codec", "--codecs", "mxfp4+spike"), "spikes are kept on an affine format"),
        (("bench", "codec", "--codecs", "int4+keep64+keep32"), "+keepN and one of +hadamard and +taco, each once"),
        (("calibrate", "nowhere"), "no model in 'nowhere'"),
        (("calibrate", "demo", "--tp", "1"), "one rank sends nothing"),
        (("calibrate", "demo", "--text", "nothing.txt"), "'nothing.txt': no such file"),
        (("demo", "--rate", "fast"), "rate 'fast': give a number and kbit, mbit or gbit"),
        (("demo", "--ranks-per-host", "2"), "--ranks-per-host 2 is for ranks behind slow links: give --rate too"),
        (("lab", "--rate", "1gbps", "--", "true"), "rate '1gbps': give a number"),
        (("lab", "--ranks", "3", "--ranks-per-host", "2", "--", "true"), "3 ranks do not fill hosts of 2"),
        (("demo", "--tp", "1"), "one rank sends nothing. Use --tp 2 or more"),
        (("demo", "--dtype", "int8"), "unknown dtype 'int8'. Allowed: auto, bfloat16, float16, float32"),
        (("bench", "all_reduce", "--sizes", "16x"), "size '16x': give bytes, or a number with k or m"),
        (("bench", "all_reduce", "--tp", "one"), "give numbers of ranks of 2 or more"),
        (
            ("bench", "all_reduce", "--algorithms", "ring"),
            "unknown algorithm 'ring'. Allowed: auto, one_step, two_step",
        ),
        (
            ("bench", "all_gather", "--algorithms", "two_step"),
            "unknown algorithm 'two_step'. Allowed: auto, one_step (",
        ),
        (("bench", "all_reduce", "--rate", "1gbit", "--ranks-per-host", "4"), "2 ranks do not fill hosts of 4"),
        (
            ("bench", "all_reduce", "--rate", "1gbit", "--mpi"),
            "--mpi compares ranks of this machine without a slow link",
        ),
        (("bench", "all_to_all", "--plot", "out.txt"), "--plot 'out.txt': give a file that ends in .png, .svg or .pdf"),
        (("bench", "ttft"), "give a model directory, or --config with one of llama-160m, llama-1b"),
        (("bench", "ttft", "demo", "--config", "llama-1b"), "give a model directory, or --config"),
        (("bench", "ttft", "--config", "llama-7b"), "unknown --config 'llama-7b'. Allowed: llama-160m, llama-1b"),
        (("bench", "ttft", "demo", "--tokens", "1k"), "--tokens '1k': give lengths of 256 or more"),
        (("bench", "ttft", "demo", "--tp", "3"), "--tp 3 does not divide the 8 attention heads"),
        (("bench", "ttft", "demo", "--plot", "out"), "--plot 'out': give a file that ends in .png, .svg or .pdf"),
    ],
)
def test_wrong_input_is_a_sentence_and_exit_status_2(arguments, message):
    start = time.monotonic()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert time.monotonic() - start < 60


def test_wrong_input_ends_the_process():
    done = alone("demo", "--codecs", "int9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown codec 'int9'")
    assert "Traceback" not in done.stderr


def test_env(tmp_path):
    done = run("env", "--json", tmp_path / "env.json")
    assert done.exit_code == 0
    assert "CPU codecs" in done.stdout
    document = json.loads((tmp_path / "env.json").read_text())
    assert document["paths"]["CPU codecs"]["state"] == "numba"
    assert document["versions"]["torch"]
    assert document["paths"]["shared memory"] == {"state": "on", "why": ""}
    assert document["paths"]["lab"]["state"] in ("on", "off")
    assert document["tuning"] == {"file": os.environ["FLASHCOMM_TUNING"], "groups": []}
    assert "nothing measured yet: see 'flashcomm tune'" in done.stdout


def test_env_says_what_was_measured_and_what_is_off(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FLASHCOMM_TUNING", str(tmp_path / "tuning.json"))
    (tmp_path / "tuning.json").write_text('{"gloo: 2 on a, shared": {}}')
    monkeypatch.setenv("FLASHCOMM_SHARED_MEMORY", "0")
    done = run("env")
    assert "gloo: 2 on a, shared" in done.stdout
    assert "off: FLASHCOMM_SHARED_MEMORY=0" in done.stdout
    (tmp_path / "tuning.json").write_text("no JSON")
    done = run("env")
    assert done.exit_code == 0
    assert "nothing measured yet" in done.stdout
    assert "it was not written by 'flashcomm tune'" in caplog.text


def no_json(name):
    raise ValueError(f"{name} is no JSON")


def test_bench_codec(tmp_path):
    done = run(
        "bench",
        "codec",
        "--codecs",
        "int8g128,lossless,bf16",
        "--mib",
        1,
        "--repeats",
        2,
        "--json",
        tmp_path / "c.json",
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "c.json").read_text(), parse_constant=no_json)["rows"]
    assert [row["codec"] for row in rows] == ["int8g128", "lossless", "bf16"]
    assert all(row["bytes_equal_specification"] for row in rows)
    assert rows[0]["bits_per_value"] == 8.25
    assert 40 < rows[0]["sqnr_db"] < 50
    assert rows[1]["sqnr_db"] is None
    assert "exact" in done.stdout


def test_calibrate_and_use_it(tmp_path):
    path = tmp_path / "demo.calibration"
    done = run("calibrate", "demo", "--tp", 2, "--tokens", 2048, "--out", path)
    assert done.exit_code == 0, done.output
    assert "17 sums, 2 ranks, 2,048 tokens" in " ".join(done.stdout.split())
    assert path.stat().st_size < 50_000
    options = ("--codec", "int4static+keep64", "--calibration", path, "--max-new-tokens", 4)
    done = run("generate", "demo", "--tp", 2, *options)
    assert done.exit_code == 0, done.output
    done = run("generate", "demo", "--tp", 4, *options)
    assert done.exit_code == 2
    assert "calibration is of 2 ranks and the group has 4" in done.stderr


def test_bench_all_reduce(tmp_path):
    done = run(
        "bench",
        "all_reduce",
        "--tp",
        2,
        "--sizes",
        "64k,1000",
        "--repeats",
        2,
        "--codecs",
        "int4g128",
        "--algorithms",
        "one_step,two_step",
        "--json",
        tmp_path / "a.json",
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["codec"], row["algorithm"]) for row in rows[:3]] == [
        ("none", "plain"), ("int4g128", "one_step"), ("int4g128", "two_step"),
    ]  # fmt: skip
    assert rows[2]["wire_bytes"] == (64 << 10) * 4.25 / 16
    assert rows[2]["chosen"] == "two_step"


@pytest.mark.thorough
@pytest.mark.skipif(lab.unavailable() is not None, reason=f"no lab here: {lab.unavailable()}")
def test_bench_joins_ranks_that_run_already(tmp_path):
    bench = ("bench", "all_gather", "--sizes", "1k,16k", "--repeats", 1, "--codecs", "int4g128")
    files = ("--json", tmp_path / "a.json", "--plot", tmp_path / "plots" / "a.png")
    done = alone("lab", "--ranks", 2, "--rate", "100mbit", "--", "python", *COMMAND[1:], *bench, *files)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["op"] == "all_gather"
    assert {(row["ranks"], row["link"], row["ceiling"]) for row in document["rows"]} == {(2, "100mbit", "link")}
    assert done.stdout.count("all_gather, bfloat16, 2 ranks, gloo on links of 100mbit") == 1
    assert (tmp_path / "plots" / "a.png").stat().st_size > 1000
    done = alone("lab", "--ranks", 2, "--rate", "100mbit", "--", "python", *COMMAND[1:], *bench, "--tp", 3)
    assert done.returncode == 2
    assert done.stderr.count("--tp 3 on a rank of 2: leave --tp out") == 1


def test_generate(tmp_path, forked_launch):
    done = run(
        "generate", "demo", "--tp", 2, "--codec", "int4g32", "--max-new-tokens", 8, "--json", tmp_path / "g.json"
    )
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "g.json").read_text())
    assert document["new_tokens"] == 8
    assert document["text"]
    assert document["text"] in forked_launch()
    assert "Warning" not in done.stderr + forked_launch()


def test_demo(tmp_path, forked_launch):
    text = tmp_path / "text.txt"
    text.write_text(held_out_text()[:20_000])
    done = run(
        "demo",
        "--text",
        text,
        "--tp",
        2,
        "--codecs",
        "int8g128,int2g32,int4static+keep64",
        "--tokens",
        2048,
        "--repeats",
        2,
        "--new-tokens",
        8,
        "--out",
        tmp_path,
        "--json",
        tmp_path / "d.json",
    )
    assert done.exit_code == 0, done.output
    assert "Warning" not in done.stderr + forked_launch()
    document = json.loads((tmp_path / "d.json").read_text())
    assert document == json.loads((tmp_path / "report.json").read_text())
    assert (document["text"], document["eval_tokens"]) == ("text.txt", 2048)
    plain, int8, int2, static = document["rows"]
    assert [row["codec"] for row in document["rows"]] == ["none", "int8g128", "int2g32", "int4static+keep64"]
    assert int8["kl"] < static["kl"] < int2["kl"]
    assert all(row["ranks_identical"] for row in document["rows"])
    assert plain["kl"] == 0
    assert plain["perplexity_change"] == 0
    assert 0 < int8["kl"] < 0.01 < int2["kl"]
    assert abs(int8["perplexity_change"]) < 0.01
    assert 8 < plain["perplexity"] < 16
    # Sixteen row-parallel sums and the embedding, 256 values each; a rank sends 2 (R - 1) / R of them.
    assert plain["wire_bytes_per_token"] == 17 * 256 * (2 if document["dtype"] == "bfloat16" else 4)
    assert int8["wire_bytes_per_token"] == 17 * 256 * 8.25 / 8
    # 'flashcomm accuracy' simulates these ranks on these windows.
    given = ("--text", text, "--tokens", 2048, "--out", tmp_path / "accuracy", "--json", tmp_path / "a.json")
    line = ("accuracy", "--tp", 2, "--codecs", "int8g128,int2g32", *given)
    found = CliRunner().invoke(app, [*map(str, line)])
    assert found.exit_code == 0, found.output
    simulated = {row["codec"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    for row in (plain, int8, int2):
        for figure in ("perplexity", "kl", "top1"):
            assert row[figure] == pytest.approx(simulated[row["codec"]][figure], rel=1e-6), (row["codec"], figure)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.thorough
def test_demo_shows_how_prompts_overlap(tmp_path):
    options = ("--codecs", "int8g128", "--tokens", 1024, "--repeats", 1, "--new-tokens", 1, "--out", tmp_path)
    done = run("demo", "--overlap", *options)
    assert done.exit_code == 0, done.output
    assert "the standard library's held-out modules" in json.loads((tmp_path / "report.json").read_text())["text"]
    assert "overlapped: the parts of the prompt take turns" in done.stdout
    for row in json.loads((tmp_path / "report.json").read_text())["rows"]:
        assert sum(map(int, row["parts"].split("+"))) == 1024
        assert min(row["predicted_ms"], row["overlapped_ms"]) > 0
        assert row["parts"] in (tmp_path / "report.html").read_text()


def test_models_are_in_bfloat16_where_this_cpu_multiplies_it_fast(monkeypatch, capsys):
    monkeypatch.setattr(base.machine, "multiplies_bf16_slowly", lambda: False)
    assert base.model_dtype("auto") == "bfloat16"
    monkeypatch.setattr(base.machine, "multiplies_bf16_slowly", lambda: True)
    assert [base.model_dtype(dtype) for dtype in ("bfloat16", "float16")] == ["bfloat16", "float16"]
    assert not capsys.readouterr().err
    assert base.model_dtype("auto") == "float32"
    assert "--dtype bfloat16" in capsys.readouterr().err


def test_bench_ttft(tmp_path):
    options = ("--tokens", 320, "--repeats", 1, "--codecs", "int8g128", "--json", tmp_path / "t.json")
    done = run("bench", "ttft", "demo", *options, "--plot", tmp_path / "plots" / "t.png")
    assert done.exit_code == 0, done.output
    assert f"demo, 320 tokens, {base.model_dtype('auto')}, 2 ranks on this machine" in done.stdout
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [(row["codec"], row["overlap"]) for row in rows] == [
        ("none", False), ("none", True), ("int8g128", False), ("int8g128", True),
    ]  # fmt: skip
    for row in rows:
        assert sum(map(int, row["parts"].split("+"))) == 320
        assert row["bound_ms"] >= max(row["communication_ms"], row["compute_ms"])
        assert row["bound_ms"] < row["communication_ms"] + row["compute_ms"]
        assert row["same_token"]
        assert (row["predicted_ms"] is not None) == row["overlap"]
    assert rows[0]["speedup"] == 1
    assert (tmp_path / "plots" / "t.png").stat().st_size > 1000


LEFT_OVER = "If no launcher, such as torchrun, has started this process as a rank: unset RANK WORLD_SIZE"


def place(rank="", world_size="", address="", port="") -> dict[str, str]:
    """The environment, with what a launcher sets or has left behind."""
    return {**os.environ, "RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": address, "MASTER_PORT": port}


@pytest.mark.parametrize("command", ["bench all_reduce --sizes 4k", "tune"])
@pytest.mark.parametrize(
    ("left", "message"),
    [
        (("1", "2"), "RANK=1 and WORLD_SIZE=2 set, but MASTER_ADDR and MASTER_PORT are not"),
        (("", "2", "host", "1234"), "WORLD_SIZE=2 set, but RANK is not"),
        (("x", "2", "host", "1234"), "RANK=x and WORLD_SIZE=2 set, but that is no rank"),
        (("2", "2", "host", "1234"), "RANK=2 and WORLD_SIZE=2 set, but that is no rank"),
        (("0", "1", "host", "1234"), "RANK=0 and WORLD_SIZE=1 set: start 2 ranks or more"),
    ],
)
def test_left_over_variables_of_a_launcher_are_an_error_that_says_what_to_do(command, left, message):
    done = CliRunner().invoke(app, command.split(), env=place(*left))
    assert done.exit_code == 2
    assert f"{message}. {LEFT_OVER}" in done.stderr


def test_empty_variables_of_a_launcher_are_none(monkeypatch):
    monkeypatch.setattr(os, "environ", {**place(), "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""})
    assert not launch.joined()
    assert launch.backend() in ("gloo", "nccl")


def test_a_rank_without_a_rank_0_says_what_is_wrong(monkeypatch):
    """Rank 0 speaks for all, unless there is none."""
    monkeypatch.setattr(base, "_LAST_WORDS_S", 0.1)
    command = ["bench", "all_reduce", "--codecs", "int9"]
    done = CliRunner().invoke(app, command, env=place("1", "2", "localhost", "1234"))
    assert done.exit_code == 2
    assert done.stderr.count("unknown codec 'int9'") == 1


def test_a_rank_that_stays_alone_says_so(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    monkeypatch.setattr(os, "environ", place("1", "2", "127.0.0.1", port))
    with pytest.raises(launch.RankError, match="rank 1 of 2 did not find the others at 127.0.0.1, port") as raised:
        launch.join(print, timeout_s=1)
    assert LEFT_OVER in str(raised.value)


def test_a_process_that_joined_is_its_owners_again(monkeypatch):
    def state():
        return signal.getsignal(signal.SIGINT), torch.get_num_threads(), logging.getLogger("flashcomm.kernels").level

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    before = state()
    monkeypatch.setattr(os, "environ", place("0", "1", "127.0.0.1", port))
    assert launch.join(state, timeout_s=20) != before
    assert not dist.is_initialized()
    assert state() == before


@pytest.fixture
def running_bench():
    """A benchmark with two ranks in the middle of measuring."""
    process = subprocess.Popen(
        [*COMMAND, "bench", "all_reduce", "--tp", "2", "--sizes", "1m", "--codecs", "int8g128", "--repeats", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        # They have sent each other the memory that they share.
        wait_for(lambda: len([pid for pid in ranks_of(process) if shares_memory(pid)]) == 2, 120)
        yield process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ranks_of(process) -> list[int]:
    return sorted(pid for pid in descendants(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())


def shares_memory(pid: int) -> bool:
    return "memfd:flashcomm" in Path(f"/proc/{pid}/maps").read_text()


def test_a_killed_rank_is_a_sentence_and_leaves_nothing_running(running_bench):
    process, family = running_bench, descendants(running_bench.pid)
    # The launcher looks at rank 0 first, so that it finds this one even if the other has failed of it already.
    os.kill(ranks_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was killed by signal 9 (SIGKILL); the other ranks have been stopped" in errors
    assert "Traceback" not in errors
    wait_until_ended(family)


def test_interrupt_leaves_nothing_running(running_bench):
    process, family = running_bench, descendants(running_bench.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; all ranks have been stopped" in errors
    assert "Traceback" not in errors
    wait_until_ended(family)


def test_the_bundled_model_is_small_enough():
    assert (MODEL / "model.safetensors").stat().st_size <= 16_000_000


def test_a_wrong_setting_is_a_sentence(monkeypatch):
    monkeypatch.setenv("FLASHCOMM_SHARED_MEMORY", "maybe")
    done = run("env")
    assert done.exit_code == 0
    assert "off: FLASHCOMM_SHARED_MEMORY='maybe': use 1 (or true, on, yes) or 0" in " ".join(done.stdout.split())
