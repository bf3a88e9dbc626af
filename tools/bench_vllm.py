"""Measure flashcomm inside vLLM: sums on one host, texts, and times to first token.

.venv-engines/bin/python tools/bench_vllm.py all_reduce --json results/vllm_all_reduce_cpu.json
.venv-engines/bin/python tools/bench_vllm.py texts --json results/vllm_texts_cpu.json
.venv-engines/bin/python tools/bench_vllm.py real --json results/vllm_real_cpu.json
.venv-engines/bin/python tools/bench_vllm.py parts --json results/vllm_parts_cpu.json
.venv-engines/bin/python tools/bench_vllm.py memory --json results/vllm_memory_cpu.json
.venv-engines/bin/python tools/bench_vllm.py ttft --rate 1gbit --json results/vllm_ttft_lab2_1gbit.json
.venv-engines/bin/python tools/bench_vllm.py ttft --rate 20mbit --tp 1 --pp 2 --codecs none,lossless,int8g128
.venv-engines/bin/python tools/bench_vllm.py ttft --rate 370mbit --model llama-160m --overlap --codecs none --eager

`all_reduce` times the sum that vLLM's CPU workers make, over memory that they share, against ours. `texts` counts which
greedy texts of the bundled model are those of vLLM's own sums, in int8 and in the order in which one rank adds up.
`real` serves SmolLM2 (tools/real_model.py) over three ranks, lets codecs take turns, and kills a rank at the end.
`ttft` starts one server on two hosts of a lab and lets codecs take turns in it, request by request: those of sums, or
with pipeline stages those of sums and hops alike. Timed prompts are random and never repeat. Weights are random too,
as times do not depend on them, but for those of the bundled model. With --overlap each codec takes two turns, in one
piece and in parts, and the rows have the planner's compute and sums. It needs root, as the lab does.
`parts` streams 16 texts at once, with steps in one piece, once more, and in parts; with chunked prefill and without.
`memory` watches a worker over 1,000 requests: of vLLM alone, and in one server in one piece and then in parts.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import flashcomm
from flashcomm import machine
from flashcomm.bench.timing import Times, interleaved
from flashcomm.demo import MODEL
from flashcomm.lab import Lab, launch
from flashcomm.models.random import CONFIGS
from flashcomm.models.text import held_out_files
from flashcomm.planner.layouts import Layout
from flashcomm.policy import Hops
from flashcomm.report.rows import write_json

SIZES = tuple(8 << (10 + n) for n in range(14))
HIDDEN = 4096
VOCABULARY = 4096
PORT = 8100
START_S = 900.0
WARMUP = 3
"""Rounds that are not timed: overlap measures, compares, and plans."""
SWITCHED = "int8g128"
"""Codec with which a server starts, so that its sums and hops are hooked."""
GIVEN = ("model", "tp", "pp", "hosts", "tokens", "repeats", "texts", "eager", "dtype")
"""Options that a node of `ttft` reads."""


def main():
    """Run the experiment that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sums = commands.add_parser("all_reduce", help="vLLM's sum over shared memory against ours")
    first = commands.add_parser("ttft", help="time to first token over a slow link")
    first.add_argument("--rate", default="1gbit", help="of each host's link")
    first.add_argument("--model", default="demo", choices=["demo", *CONFIGS], help="whose shape; weights are random")
    first.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks of a stage")
    first.add_argument("--pp", type=int, default=1, help="pipeline stages")
    first.add_argument(
        "--hosts", type=int, default=2, help="hosts, each with a core of its own and a part of the ranks"
    )
    first.add_argument("--tokens", type=int, default=1024)
    first.add_argument("--codecs", default="none,int8g128,int4g128")
    first.add_argument("--texts", type=int, default=0, help="greedy texts to compare with those of the first codec")
    first.add_argument("--overlap", action="store_true", help="each codec in one piece and in parts")
    first.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    first.add_argument("--eager", action="store_true", help="vLLM without compiled graphs")
    same = commands.add_parser("texts", help="greedy texts that compression changes, and that one rank changes")
    mixed = commands.add_parser("parts", help="texts of steps in parts")
    watched = commands.add_parser("memory", help="a worker's memory over many requests, in one piece and in parts")
    watched.add_argument("--requests", type=int, default=1000)
    real = commands.add_parser("real", help="a real model over three ranks: texts, counts, and a rank that is killed")
    real.add_argument("--codecs", default="int8g128+hadamard,int8g128")
    real.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    for command, repeats in ((sums, 21), (first, 11)):
        command.add_argument("--repeats", type=int, default=repeats)
    for command in (sums, first, same, mixed, watched, real):
        command.add_argument("--json", type=Path)
    node = commands.add_parser("node")
    node.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "node":
        Node(options.folder).run()
        return
    if options.command == "texts":
        rows = texts()
    elif options.command == "parts":
        rows = in_parts()
    elif options.command == "memory":
        rows = memory(options.requests)
    elif options.command == "real":
        rows = real_model(options.codecs.split(","), options.dtype)
    else:
        rows = all_reduce(options.repeats) if options.command == "all_reduce" else ttft(options)
    for row in rows:
        print(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()), sep="  ")
    if options.json:
        document = {"machine": machine.describe(), "rows": rows}
        write_json(options.json, document)


def all_reduce(repeats: int) -> list[dict]:
    """Measure rows of one size and algorithm each; 2 ranks on this host."""
    os.environ["VLLM_DIST_IDENT"] = f"flashcomm-bench-{os.getpid()}"
    return launch.run(_sums_of_rank, (repeats,), ranks=2, timeout_s=300)[0]


def _sums_of_rank(repeats: int) -> list[dict]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(ranks, rank, "env://", rank, "gloo")
        parallel_state.initialize_model_parallel(ranks)
    tp = parallel_state.get_tp_group()
    communicator, group = tp.device_communicator, tp.device_group
    if communicator.dist_module is torch.distributed:
        raise RuntimeError("vLLM does not share memory here, so there is nothing to compare with")
    rows = []
    for size in SIZES:
        x = torch.randn(size // 2, dtype=torch.bfloat16).view(-1, min(HIDDEN, size // 2))
        ours = partial(flashcomm.all_reduce, x, "int8g128", group)
        variants = {
            "vllm": partial(communicator.all_reduce, x.clone()),
            "auto": ours,
            "auto, out=": partial(ours, out=torch.zeros_like(x)),
            "int8g128": partial(ours, algorithm="one_step"),
            "gloo": partial(dist.all_reduce, x.clone(), group=group),
        }
        times = interleaved(variants, repeats=repeats, before=dist.barrier, combine=_slowest)
        rows += [
            {
                "op": "vllm_all_reduce",
                "dtype": "bfloat16",
                "message_bytes": size,
                "way": way,
                "ranks": ranks,
                "repeats": repeats,
                "p50_ms": measured.p50_ms,
                "p20_ms": measured.p20_ms,
                "p80_ms": measured.p80_ms,
                "speedup": times["vllm"].p50_ms / measured.p50_ms,
            }
            for way, measured in times.items()
        ]
    return rows


def _slowest(seconds):
    worst = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.tolist()


def ttft(options: argparse.Namespace) -> list[dict]:
    """Measure rows of one codec each, seen from the client on the first host."""
    with tempfile.TemporaryDirectory(prefix="flashcomm-vllm-") as name, Lab(options.hosts, options.rate) as lab:
        folder = Path(name)
        write_model(folder / "model", options.model)
        given = {name: getattr(options, name) for name in GIVEN}
        overlaps = ["off", "auto"] if options.overlap else ["off"]
        ways = [(codec, overlap) for codec in options.codecs.split(",") for overlap in overlaps]
        task = {"ways": ways, **given}
        policy = f'codec = "{SWITCHED}"\noverlap = "{overlaps[-1]}"\n[hops]\npp = "{SWITCHED}"\n'
        (folder / "policy.toml").write_text(policy)
        (folder / "task.json").write_text(json.dumps(task))
        codes = lab.run([sys.executable, __file__, "node", str(folder)], timeout_s=2 * START_S)
        if any(codes):
            log = (folder / "0.log").read_text().splitlines()
            # The first error ended the server.
            told = [line for line in log if " ERROR " in line][:40] or log[-40:]
            raise SystemExit("\n".join([f"the nodes ended with {codes}:", *told]))
        figures = json.loads((folder / "result.json").read_text())
    return [
        {
            "op": "vllm_ttft",
            "model": options.model,
            "backend": "gloo",
            "dtype": options.dtype,
            "link": options.rate,
            "ranks": options.tp * options.pp,
            **({"layout": str(Layout(tp=options.tp, pp=options.pp))} if options.pp > 1 else {}),
            "tokens": options.tokens,
            "repeats": options.repeats,
            **one,
            "speedup": figures[0]["p50_ms"] / one["p50_ms"],
        }
        for one in figures
    ]


def write_model(folder: Path, name: str):
    """Make a model's folder: its configuration, a tokenizer for the server, and weights if it is the bundled one."""
    unused = ["*.png", "*.md", "training.json", *(["*.safetensors"] if name != "demo" else [])]
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns(*unused))
    if name != "demo":
        config = json.loads((folder / "config.json").read_text())
        changed = {**config, "head_dim": None, **CONFIGS[name], "vocab_size": config["vocab_size"]}
        (folder / "config.json").write_text(json.dumps(changed))


def texts() -> list[dict]:
    """Count the texts of the tests' prompts that equal those of vLLM's own sums; a row for each type and algorithm."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "engines"))
    from server import Server  # pyright: ignore[reportMissingImports]
    from test_vllm import EAGER_POLICY, greedy, prompts  # pyright: ignore[reportMissingImports]

    asked, rows = prompts(), []
    with tempfile.TemporaryDirectory(prefix="flashcomm-vllm-") as name:
        policy, log = Path(name, "policy.toml"), Path(name, "log")
        policy.write_text(EAGER_POLICY)
        ways: dict[str, tuple[list[str], dict[str, str]]] = {
            "vLLM's own": ([], {}),
            "vLLM's own, one rank": (["--tensor-parallel-size", "1"], {}),
            "int8g128": ([], {"FLASHCOMM_POLICY": str(policy)}),
        }
        for dtype in ("float32", "bfloat16"):
            answers = {}
            for way, (arguments, env) in ways.items():
                with Server(log, "--enforce-eager", *arguments, dtype=dtype, env=env) as server:
                    answers[way] = greedy(server, asked)
            own = answers["vLLM's own"]
            rows += [
                {
                    "op": "vllm_texts",
                    "dtype": dtype,
                    "way": way,
                    "texts": len(own),
                    "same": sum(one == other for one, other in zip(theirs, own, strict=True)),
                }
                for way, theirs in answers.items()
            ]
    return rows


def in_parts() -> list[dict]:
    """Compare streamed texts of steps in parts with those of one piece; a row for each way, prefix caching on."""
    prompts = _engine_tests().prompts()
    rows = []
    chunked = ["--max-num-batched-tokens", "512"]
    whole = ["--max-num-batched-tokens", "2048", "--no-enable-chunked-prefill"]
    for dtype, arguments in (("float32", chunked), ("float32", whole), ("bfloat16", chunked)):
        with _server(*arguments, dtype=dtype, env={"FLASHCOMM_OVERLAP": "2"}) as server:
            plain: list[str] = []
            for overlap in ("off", "off", 2, 3):
                server.ask("/reset_prefix_cache", {})
                server.on_workers("flashcomm_overlap", overlap)
                server.on_workers("flashcomm_stats")
                got = _streamed(server, prompts)
                plain = plain or got
                row = {"op": "vllm_parts", "dtype": dtype, "chunked": arguments is chunked, "parts": overlap}
                row |= {"texts": len(got), "same": sum(map(str.__eq__, got, plain))}
                counts = server.on_workers("flashcomm_stats")[0]["prefills"]
                row["steps_in_parts"] = sum(count for how, count in counts.items() if how[0].isdigit())
                rows.append(row)
                print(row, flush=True)
    return rows


def memory(requests: int) -> list[dict]:
    """Watch a worker's memory; a row after each tenth of the requests, in fp32 with prefix caching on.

    Args:
        requests: number of mixed requests, of vLLM alone and then of flashcomm, where the second half runs in parts.
    """
    ids, rows = _engine_tests().tokens(), []
    # oneDNN keeps what it has made for each length, which hides what else grows.
    own = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    for env in (own, {**own, "FLASHCOMM_OVERLAP": "2"}):
        # Few blocks of the cache, all of them used soon: pages that were never written take no memory.
        few = ("--num-gpu-blocks-override", "160", "--max-num-batched-tokens", "512")
        generator = random.Random(0)
        with _server(*few, dtype="float32", env=env) as server:
            for tenth in range(10):
                parts = "vLLM alone" if env is own else "off" if tenth < 5 else 2
                if env is not own:
                    server.on_workers("flashcomm_overlap", parts)
                lengths = [generator.randrange(1, 900) for _ in range(requests // 10)]
                starts = [generator.choice((0, generator.randrange(3000))) for _ in lengths]
                _streamed(server, [ids[at : at + length] for at, length in zip(starts, lengths, strict=True)])
                done = (tenth + 1) * (requests // 10)
                rows.append({"op": "vllm_memory", "parts": parts, "requests": done, "memory_mib": memory_mib(server)})
                print(rows[-1], flush=True)
    return rows


def _engine_tests() -> Any:
    """The tests of vLLM, for their prompts."""
    for folder in ("tests", "tests/engines"):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))
    import test_vllm  # pyright: ignore[reportMissingImports]

    return test_vllm


@contextmanager
def _server(*arguments: str, dtype: str, env: dict[str, str]) -> Iterator[Any]:
    from server import Server  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory(prefix="flashcomm-vllm-") as name:
        log = Path(name, "log")
        with Server(log, "--enforce-eager", "--enable-prefix-caching", *arguments, dtype=dtype, env=env) as server:
            yield server


def _streamed(server: Any, prompts: list) -> list[str]:
    """Texts of 8 tokens, 16 at a time."""
    with ThreadPoolExecutor(16) as pool:
        stream = partial(server.stream, max_tokens=8)
        return list(pool.map(lambda prompt: "".join(stream(prompt)), prompts))


def memory_mib(server: Any) -> float:
    """Resident memory of the first worker, in MiB."""
    # vLLM's route answers with text, but for lists and dicts.
    return int(server.on_workers("flashcomm_memory")[0]) / 2**20


def real_model(codecs: list[str], dtype: str) -> list[dict]:
    """Serve SmolLM2 over three ranks; a row for each codec, and one for the end.

    Args:
        codecs: of prompts and decode steps alike, one after the other in one server.
        dtype: of weights and activations.
    """
    for folder in ("tests", "tests/engines"):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))
    import real_model as made  # pyright: ignore[reportMissingImports]
    from server import Server  # pyright: ignore[reportMissingImports]
    from test_vllm import greedy, lengths, lose_a_worker  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    from events import wait_for  # pyright: ignore[reportMissingImports]

    made.main()
    ids = AutoTokenizer.from_pretrained(made.MODEL)(made.BOOK.read_text(), verbose=False)["input_ids"]
    asked = [ids[400 * n : 400 * n + length] for n, length in enumerate(lengths())]
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="flashcomm-vllm-") as name:
        policy = Path(name, "policy.toml")
        policy.write_text(f'codec = "{codecs[0]}"\nphase = "all"\nmin_bytes = 0\nalgorithm = "two_step"\n')
        env = {"FLASHCOMM_POLICY": str(policy)}
        with Server(Path(name, "log"), "--enforce-eager", model=made.MODEL, ranks=3, dtype=dtype, env=env) as server:

            def row(codec: str, texts: int, same: int, start: float, counts: dict) -> dict:
                return {
                    "op": "vllm_real",
                    "model": made.MODEL.name,
                    "dtype": dtype,
                    "ranks": 3,
                    "codec": codec,
                    "texts": texts,
                    "same": same,
                    "compressed_sums": sum(counts["calls"].values()),
                    "plain_sums": sum(counts["plain"].values()),
                    "wire_bytes": counts["wire_bytes"],
                    "plain_bytes": counts["plain_bytes"],
                    "seconds": time.perf_counter() - start,
                }

            plain: list[str] = []
            for codec in ("none", "none", "fp32", *codecs):
                server.on_workers("flashcomm_use", codec)
                server.on_workers("flashcomm_stats")
                start = time.perf_counter()
                texts = greedy(server, asked)
                plain = plain or texts
                same = sum(one == other for one, other in zip(texts, plain, strict=True))
                metric = "flashcomm_plain_total" if codec == "none" else "flashcomm_calls_total"
                # Workers write their counts once a second.
                wait_for(partial(_equal_counts, server, metric, codec), 60)
                first, *others = server.on_workers("flashcomm_stats")
                if any(other["calls"] != first["calls"] for other in others):
                    raise SystemExit(f"ranks differ in {codec}: {first['calls']}, {others}")
                rows.append(row(codec, len(asked), same, start, first))
                print(rows[-1], flush=True)
            start = time.perf_counter()
            lose_a_worker(server)
            rows.append(row("a killed rank", 0, 0, start, {**first, "calls": {}, "plain": {}}))
    return rows


def _equal_counts(server: Any, metric: str, codec: str) -> bool:
    """Whether /metrics shows the same number of sums in `codec` for each of three ranks."""
    found = [value for labels, value in server.metrics(metric).items() if f'{codec}"' in labels]
    return len(found) == 3 and len(set(found)) == 1 and found[0] > 0


class Node:
    """Run one host's part of a server, and on the first host its client.

    Args:
        folder: holds the model and the settings of the measurement; both hosts see it.
    """

    def __init__(self, folder: Path):
        self._folder, self._rank = folder, int(os.environ["RANK"])
        self._task = json.loads((folder / "task.json").read_text())

    def run(self):
        """Serve until the client on the first host is done."""
        with (self._folder / f"{self._rank}.log").open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, "-c", _SERVE, *self._arguments()],
                env={**os.environ, **self._environment()}, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        done = self._folder / "result.json"
        try:
            if self._rank == 0:
                self._wait_for(server)
                figures = self._measure()
                partial_file = done.with_suffix(".partial")
                partial_file.write_text(json.dumps(figures))
                partial_file.replace(done)
            while not done.exists():
                if server.poll() is not None:
                    raise SystemExit(f"host {self._rank}: the server ended with {server.returncode}")
                time.sleep(0.2)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)

    def _arguments(self) -> list[str]:
        headless = ["--headless"] if self._rank else []
        address = ("--node-rank", str(self._rank), "--master-addr", os.environ["MASTER_ADDR"])
        nodes = ["--nnodes", str(self._task["hosts"]), *address] if self._task["hosts"] > 1 else []
        longest = max(2048, self._task["tokens"] + 16)
        return [
            *("serve", str(self._folder / "model"), "--served-model-name", "demo"),
            *("--load-format", "auto" if self._task["model"] == "demo" else "dummy"),
            *("--host", "127.0.0.1", "--port", str(PORT), "--dtype", self._task["dtype"]),
            *("--tensor-parallel-size", str(self._task["tp"]), "--pipeline-parallel-size", str(self._task["pp"])),
            *("--distributed-executor-backend", "mp", "--max-model-len", str(longest), "--max-num-seqs", "4"),
            *("--max-num-batched-tokens", str(longest), *(["--enforce-eager"] if self._task["eager"] else [])),
            *("--no-enable-prefix-caching", "--worker-extension-cls", "bench_vllm.Switch", *nodes, *headless),
        ]

    def _environment(self) -> dict[str, str]:
        hosts = self._task["hosts"]
        return {
            "FLASHCOMM_POLICY": str(self._folder / "policy.toml"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join([str(self._rank)] * (self._task["tp"] * self._task["pp"] // hosts)),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_HOST_IP": f"10.77.0.{self._rank + 1}",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }

    def _wait_for(self, server: subprocess.Popen):
        end = time.monotonic() + START_S
        while server.poll() is None and time.monotonic() < end:
            try:
                self._ask("/health")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise SystemExit("the server did not start")

    def _measure(self) -> list[dict]:
        """Time requests in turns, forwards and backwards; switching codec and overlap is not timed."""
        ways, repeats = self._task["ways"], self._task["repeats"]
        generator = random.Random(0)
        seconds: list[list[float]] = [[] for _ in ways]
        said: list[dict] = [{} for _ in ways]
        for number in range(-WARMUP, repeats):
            for way in range(len(ways)) if number % 2 == 0 else reversed(range(len(ways))):
                self._on_workers("flashcomm_use", *ways[way])
                prompt = [generator.randrange(1, VOCABULARY) for _ in range(self._task["tokens"])]
                start = time.perf_counter()
                self._ask("/v1/completions", {"model": "demo", "prompt": prompt, "max_tokens": 1, "ignore_eos": True})
                if number >= 0:
                    seconds[way].append(time.perf_counter() - start)
                said[way] = self._on_workers("flashcomm_said")[0]
        figures, texts = [], self._texts(ways)
        for (codec, overlap), taken, of_worker, mine in zip(ways, seconds, said, texts, strict=True):
            times = Times(seconds=tuple(sorted(taken)))
            row = {
                "codec": codec,
                "overlap": overlap,
                "p50_ms": times.p50_ms,
                "p20_ms": times.p20_ms,
                "p80_ms": times.p80_ms,
                **of_worker,
            }
            if mine:
                same = sum(one == other for one, other in zip(mine, texts[0], strict=True))
                row |= {"texts": len(mine), "same": same}
            figures.append(row)
        return figures

    def _texts(self, ways: list) -> list[list[str]]:
        """Greedy texts of 8 tokens in each way, after the same prompts of held-out code, of 1 to 1,500 tokens."""
        found: list[list[str]] = [[] for _ in ways]
        if not self._task["texts"]:
            return found
        from transformers import AutoTokenizer

        code = held_out_files()[0].read_text()
        ids = AutoTokenizer.from_pretrained(self._folder / "model")(code, verbose=False)["input_ids"]
        lengths = [1, 2, 1500, *(16 + (n * 397) % 500 for n in range(self._task["texts"] - 3))]
        for way, mine in zip(ways, found, strict=True):
            self._on_workers("flashcomm_use", *way)
            for n, length in enumerate(lengths):
                body = {"model": "demo", "prompt": ids[37 * n : 37 * n + length], "max_tokens": 8, "temperature": 0.0}
                mine.append(self._ask("/v1/completions", body)["choices"][0]["text"])
        return found

    def _on_workers(self, method: str, *args: str) -> list:
        return self._ask("/collective_rpc", {"method": method, "args": list(args)})["results"]

    def _ask(self, path: str, body: "dict | None" = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
        return json.loads(text) if text else None


class Switch:
    """Methods of every worker, by vLLM's --worker-extension-cls."""

    def flashcomm_use(self, codec: str, overlap: str) -> str:
        """Send all sums and hops in `codec` from the next request on, ``none`` leaves them to vLLM; overlap, or not."""
        from flashcomm.integrations import vllm

        if vllm.worker is not None:
            vllm.worker.use(replace(vllm.worker.policy, codec=codec, hops=Hops(pp=codec), overlap=overlap))
        flashcomm.reset_stats()
        return codec

    def flashcomm_said(self) -> dict:
        """Formats and bytes that have been sent since then; parts, and what the planner says of them."""
        from flashcomm.integrations import vllm

        stats = flashcomm.stats()
        sent = {"calls": ", ".join(sorted(stats["calls"])) or "vLLM's own", "wire_bytes": stats["wire_bytes"]}
        overlap = vllm.worker and vllm.worker.overlap
        if not overlap:
            return sent
        split = overlap.last_split
        profile = next((one for key, one in overlap.profiles.items() if key[0] == vllm.worker.policy.codec), None)
        planned = {"parts": "", "predicted_ms": None, "compute_ms": None, "sums_ms": None}
        if split and profile:
            tokens = sum(split.sizes)
            planned = {
                "parts": "+".join(map(str, split.sizes)),
                "predicted_ms": 1e3 * split.seconds,
                "compute_ms": 1e3 * profile.compute_s(tokens),
                "sums_ms": 1e3 * profile.communication_s(tokens),
            }
        return {**sent, **planned}


# The package is installed as vllm-cpu, and vLLM's command asks for vllm.
_SERVE = """
import importlib.metadata as metadata, sys
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""

if __name__ == "__main__":
    main()
