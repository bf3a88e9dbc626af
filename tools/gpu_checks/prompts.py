"""Models: logits over two ranks on one GPU, and prompts in parts beside a simulated link."""

import os
import statistics
import time
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch.distributed as dist

import flashcomm
from gpu_checks.measuring import DRY, note, synchronize

_GREATEST_CHANGE = {"fp32": 1e-3, "int8g128": 0.05, "int4g32": 0.5}
"""Relative change of logits that is no mistake: fp32 adds in another order, and the others are what they are."""


def model():
    """Note how codecs change the logits of the bundled model over two processes on one GPU, and what it generates."""
    import ranks

    group = ranks.Ranks(2)
    found = group.run(_logits)
    group.close()
    changed = {codec: change for codec, change in found[0].items() if codec in _GREATEST_CHANGE}
    wrong = [f"{codec}: {change}" for codec, change in changed.items() if not change < _GREATEST_CHANGE[codec]]
    note(ranks=found, wrong=wrong + (["ranks differ"] if found[0] != found[1] else []))
    print(found)


def _logits() -> dict:
    from flashcomm.demo import MODEL
    from flashcomm.integrations.transformers import compressed
    from flashcomm.models.load import load_model

    os.environ["LOCAL_RANK"] = str(dist.get_rank() % torch.cuda.device_count())
    made = load_model(MODEL, torch.float32)
    ids = torch.randint(2, 4000, (2, 300), generator=torch.Generator().manual_seed(3)).to(made.device)
    found: dict = {"device": made.device.type}
    with torch.inference_mode():
        want = made(ids, use_cache=False).logits
        for codec in _GREATEST_CHANGE:
            with compressed(made, codec, algorithm="two_step"):
                got = made(ids, use_cache=False).logits
            found[codec] = float((got - want).norm() / want.norm())
        with compressed(made, "int8g128", algorithm="two_step"):
            text = made.generate(ids[:1, :32], max_new_tokens=8, do_sample=False)
    return found | {"generated": text[0, 32:].tolist(), "calls": dict(flashcomm.stats()["calls"])}


class Link:
    """A link that takes time and carries nothing: a kernel of one thread waits as long as the bytes would take."""

    def __init__(self):
        self.gb_s, self._cycles_s = 0.0, 1e9
        if not DRY:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(1_000_000)
            start.record()
            torch.cuda._sleep(50_000_000)
            end.record()
            synchronize()
            self._cycles_s = 50_000_000 / (start.elapsed_time(end) / 1e3)

    def after(self, function):
        """Let the stream wait for the link after a transfer of a `Backend`, of which half goes to the other rank."""

        def transferred(backend, received, sent):
            work = function(backend, received, sent)
            if self.gb_s and not DRY:
                torch.cuda._sleep(int(sent.numel() / 2 / (self.gb_s * 1e9) * self._cycles_s))
            return work

        return transferred


@contextmanager
def _made():
    from flashcomm.demo import MODEL
    from flashcomm.models.load import load_model
    from flashcomm.models.random import random_model

    if DRY:
        yield load_model(MODEL, torch.float32)
        return
    with random_model("llama-1b", torch.bfloat16) as folder:
        yield load_model(folder, torch.bfloat16)


def iso():
    """Note times of prompts in one and two parts on one rank of two, whose other rank and link are simulated.

    Codecs are real kernels on the side stream.
    """
    if find_spec("greenlet") is None:
        note(missing="greenlet, which parts of a prompt take turns by")
        return
    from flashcomm.codecs import parse
    from flashcomm.integrations.transformers import compress
    from flashcomm.overlap import wrap
    from flashcomm.transports.backend import Backend
    from gpu_checks.routes import join_fake

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29790")
    join_fake(2)
    link, table = Link(), {}
    Backend.exchange, Backend.gather = link.after(Backend.exchange), link.after(Backend.gather)
    with _made() as made:
        handle = compress(made, "bf16", algorithm="two_step")
        for tokens in (32,) if DRY else (1024, 4096):
            ids = torch.randint(2, 4000, (1, tokens)).to(made.device)
            for link.gb_s in (0.0,) if DRY else (0.0, 5.0, 20.0):
                for codec in ("int8g128",) if DRY else ("bf16", "int8g128", "int4g128"):
                    handle.codec = parse(codec)
                    for parts in (1, 2):
                        overlap = wrap(made, parts=parts)
                        name = f"{tokens} tokens, {link.gb_s:g} GB/s, {codec}, {parts} parts"
                        table[name] = _prompt_ms(made, ids)
                        overlap.undo()
                        print(f"{name:50s} {table[name]}", flush=True)
                note(ms_of_device_and_host=table)


def _prompt_ms(made, ids: torch.Tensor) -> tuple[float, float]:
    """Median milliseconds of a prompt until the device and until the host is done."""
    device, host = [], []
    with torch.inference_mode():
        for _ in range(1 if DRY else 5):
            synchronize()
            start = time.perf_counter()
            made(ids, use_cache=True, logits_to_keep=1)
            host.append(time.perf_counter() - start)
            synchronize()
            device.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(device), 2), round(1e3 * statistics.median(host), 2)
