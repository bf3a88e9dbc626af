"""A vLLM server of this machine for tests: started, asked over HTTP, and gone with all that it started."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from events import wait_for
from flashcomm.demo import MODEL

HERE = Path(__file__).parent
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
START_S = 900.0
"""Seconds that a server may take to start on a busy machine."""
SHARED = Path("/dev/shm")


class Server:
    """``vllm serve`` of a model over ranks of this machine; a context manager.

    Args:
        log: file for what it prints.
        arguments: beyond the model and the number of ranks.
        model: a Hugging Face model directory.
        ranks: tensor-parallel ranks, in each stage; all share the first two cores.
        stages: pipeline stages.
        dtype: of weights and activations.
        env: what asks flashcomm for something.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        model: Path = MODEL,
        ranks: int = 2,
        stages: int = 1,
        dtype: str = "bfloat16",
        env: "dict[str, str] | None" = None,
    ):
        # Kept until the end, so that nobody else is given the port; vLLM's own socket may have it too.
        self._kept = socket.socket()
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            self._kept.setsockopt(socket.SOL_SOCKET, option, 1)
        self._kept.bind(("127.0.0.1", 0))
        self.port = self._kept.getsockname()[1]
        self.log = log
        self._before = set(SHARED.iterdir())
        self._argv = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--tensor-parallel-size", str(ranks), "--pipeline-parallel-size", str(stages)),
            *("--max-model-len", "2048", "--max-num-seqs", "16"),
            *("--dtype", dtype, "--chat-template", CHAT_TEMPLATE, "--no-enable-prefix-caching"),
            *("--worker-extension-cls", "probe.Probe", *arguments),
        ]
        asked = ("FLASHCOMM_CODEC", "FLASHCOMM_OVERLAP", "FLASHCOMM_POLICY", "TRITON_INTERPRET")
        self._env = {name: value for name, value in os.environ.items() if name not in asked}
        self._env |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(rank % 2) for rank in range(ranks * stages)),
            "VLLM_SERVER_DEV_MODE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            **(env or {}),
        }

    def __enter__(self) -> "Server":
        self.start()
        try:
            wait_for(lambda: self._answers() or self.process.poll() is not None, START_S)
            assert self.process.poll() is None
        except AssertionError:
            self.stop()
            raise RuntimeError(f"the server did not start:\n{self.printed()[-4000:]}") from None
        return self

    def __exit__(self, *exc_info: object):
        self.stop()

    def start(self):
        """Start it without waiting for an answer."""
        with self.log.open("wb") as log:
            # Should the tests be killed, the kernel ends the server.
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *self._argv],
                env=self._env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self):
        """End it and all that it started; what killed processes left in /dev/shm is removed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._kept.close()
        in_use = _mapped()
        for left in set(SHARED.iterdir()) - self._before:
            if ("cpushm" in left.name or left.name.startswith("psm_")) and str(left) not in in_use:
                left.unlink(missing_ok=True)

    def printed(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace")

    @contextlib.contextmanager
    def _answer(self, path: str, body: "dict | None", timeout_s: float) -> Iterator:
        """The answer to a POST of `body`, or to a GET, as a file."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                raise OSError(f"{path}: {error.code} {error.read().decode()}") from None

    def ask(self, path: str, body: "dict | None" = None, timeout_s: float = 120.0):
        """What a POST of `body`, or a GET, returns: JSON, or text where it is none."""
        with self._answer(path, body, timeout_s) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith(("{", "[")) else text

    def complete(self, prompt: "list[int] | str", **options) -> dict:
        """The first choice of a greedy completion."""
        body = {"model": "demo", "prompt": prompt, "temperature": 0.0, **options}
        return self.ask("/v1/completions", body)["choices"][0]

    def stream(self, prompt: "list[int] | str", **options) -> Iterator[str]:
        """The tokens of a greedy completion, as they come."""
        body = {"model": "demo", "prompt": prompt, "temperature": 0.0, "stream": True, **options}
        with self._answer("/v1/completions", body, 120) as answer:
            for line in answer:
                event = line.decode().removeprefix("data: ").strip()
                if event == "[DONE]":
                    return
                if event:
                    yield json.loads(event)["choices"][0]["text"]
        raise OSError("the stream ended before the completion did")

    def on_workers(self, method: str, *args) -> list:
        """Call a method of `probe.Probe` on each rank and return the answers, as text but for lists and dicts."""
        return self.ask("/collective_rpc", {"method": method, "args": list(args)})["results"]

    def metrics(self, name: str) -> dict[str, float]:
        """The samples of one metric on /metrics, by their labels."""
        lines = self.ask("/metrics").splitlines()
        samples = [line[len(name) :].rsplit(" ", 1) for line in lines if line.startswith(name + "{")]
        return {labels: float(value) for labels, value in samples}

    def _answers(self) -> bool:
        try:
            self.ask("/health", timeout_s=2)
        except (urllib.error.URLError, OSError):
            return False
        return True


def _mapped() -> str:
    """What all processes have mapped: others may run beside these tests."""
    maps = []
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            maps.append(path.read_text())
    return "".join(maps)
