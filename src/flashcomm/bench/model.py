"""Load a model over the ranks of the current process group, and measure it: accuracy against plain, and TTFT."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import flashcomm
from flashcomm.bench.timing import Times, interleaved
from flashcomm.integrations.transformers import Compression, tensor_parallel_argument
from flashcomm.overlap import Overlap
from flashcomm.planner.overlap import Split


def check_directory(directory: Path, ranks: int):
    """Refuse a model directory that cannot be loaded over `ranks` ranks, before any process is started.

    Raises:
        ValueError: no such model, or heads that do not divide; says what is there and what is allowed.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"no model in {str(directory)!r}: a Hugging Face model directory has a config.json")
    config = json.loads(path.read_text())
    config = config.get("text_config", config)
    heads = config.get("num_attention_heads", 0)
    kv_heads = config.get("num_key_value_heads", heads)
    if heads % ranks or kv_heads % ranks:
        fits = [n for n in range(1, heads + 1) if heads % n == 0 and kv_heads % n == 0]
        raise ValueError(
            f"--tp {ranks} does not divide the {heads} attention heads and {kv_heads} key/value heads of "
            f"{str(directory)!r}. Allowed: {', '.join(map(str, fits))}"
        )


def load(directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) from a local directory, tensor parallel over the default group if there is one."""
    model = load_model(directory, dtype)
    import transformers

    return model, transformers.AutoTokenizer.from_pretrained(directory)


def load_model(directory: Path, dtype: torch.dtype) -> Any:
    """The model of `load`, for directories without a tokenizer too."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    plan = tensor_parallel_argument() if dist.is_initialized() and dist.get_world_size() > 1 else {}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **plan).eval()


def switch(handle: Compression, spec: str, algorithm: str):
    """Make the next forward passes use `spec`; an algorithm that was asked for says nothing about plain sums."""
    handle.codec = flashcomm.codec(spec)
    handle.algorithm = "plain" if spec == "none" else algorithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """What a codec does to a model, teacher-forced over the same tokens as plain."""

    perplexity: float
    perplexity_change: float
    """Relative to plain: 0.01 is one percent worse."""
    kl: float
    """Mean over tokens of KL(plain || codec), all of the vocabulary, in nats."""
    top1: float
    """Share of tokens whose most likely successor is plain's."""
    ranks_identical: bool
    """Whether all logits had the same bits on every rank."""

    def as_dict(self) -> dict:
        """The figures by name."""
        return asdict(self)


@torch.inference_mode()
def accuracy(
    model: Any,
    handle: Compression,
    specs: Sequence[str],
    windows: Sequence[torch.Tensor],
    algorithm: str = "auto",
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Accuracy]:
    """Compare each codec with the plain sums on windows of token ids.

    Args:
        model: tensor parallel, compressed by `handle`.
        handle: its compression; the codec is switched between forward passes.
        specs: codecs.
        windows: token ids, each [tokens]; a token is judged by its predecessors in the window.
        algorithm: of the compressed sums.
        progress: called after each forward pass.

    Returns:
        One `Accuracy` per codec; the same on every rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Per codec: negative log-likelihood, KL, agreements, windows whose bits differed; then the token count.
    sums = {spec: torch.zeros(5, dtype=torch.float64) for spec in ("none", *specs)}
    for window in windows:
        # Each rank judges its share of the tokens, so no core idles while rank 0 computes softmaxes.
        mine = slice(rank, len(window) - 1, ranks)
        window = window.to(model.device)
        targets = window[1:][mine, None]
        plain = None
        for spec in sums:
            switch(handle, spec, algorithm)
            logits = model(window[None], use_cache=False).logits[0]
            digest = hashlib.blake2b(logits.view(torch.uint8).cpu().numpy().tobytes(), digest_size=16).digest()
            digests = [b""] * ranks
            dist.all_gather_object(digests, digest)
            log_p = logits[:-1][mine].float().log_softmax(-1)
            if plain is None:
                plain = log_p
            figures = [
                -log_p.gather(1, targets).double().sum(),
                (plain.exp() * (plain - log_p)).sum(1).double().sum(),
                (plain.argmax(1) == log_p.argmax(1)).double().sum(),
                len(set(digests)) > 1,
                len(targets),
            ]
            sums[spec] += torch.tensor([float(figure) for figure in figures], dtype=torch.float64)
            progress()
    for spec in sums:
        total = sums[spec].to(model.device)
        dist.all_reduce(total)
        sums[spec] = total.cpu()
    base = sums["none"][0] / sums["none"][4]
    results = {}
    for spec in specs:
        nll, kl, agree, differing, tokens = sums[spec].tolist()
        results[spec] = Accuracy(
            perplexity=torch.tensor(nll / tokens).exp().item(),
            perplexity_change=torch.expm1(torch.tensor(nll / tokens - base.item(), dtype=torch.float64)).item(),
            kl=max(kl / tokens, 0.0),
            top1=agree / tokens,
            ranks_identical=differing == 0,
        )
    return results


class Prefill(NamedTuple):
    """Time to first token with one codec."""

    times: Times
    """Of the slowest rank."""
    wire_bytes_per_token: float
    """That one rank sends."""
    algorithms: str
    """That ran."""
    overlapped: Times | None = None
    """As `times`, with `flashcomm.overlap`."""
    split: Split | None = None
    """How that cut the prompt."""


@torch.inference_mode()
def prefill(
    model: Any,
    handle: Compression,
    specs: Sequence[str],
    prompt: torch.Tensor,
    repeats: int,
    algorithm: str = "auto",
    progress: Callable[[], object] = lambda: None,
    overlap: Overlap | None = None,
) -> dict[str, Prefill]:
    """Time to first token of each codec, all taking turns in one run; with `overlap`, of each in parts as well."""

    def first_token(spec: str, parts: int | str = 1):
        switch(handle, spec, algorithm)
        if overlap:
            overlap.parts = parts
        # The host reads the token, so on a GPU the time ends when it is there.
        model(prompt[None], use_cache=True, logits_to_keep=1).logits.argmax(-1).item()

    prompt = prompt.to(model.device)
    facts, splits = {}, {}
    for spec in specs:
        flashcomm.reset_stats()
        first_token(spec)
        stats = flashcomm.stats()
        algorithms = sorted({call.split("/")[1] for call in stats["calls"]})
        facts[spec] = (stats["wire_bytes"] / len(prompt), "+".join(algorithms))
        if overlap:
            first_token(spec, "auto")  # measures
            first_token(spec, "auto")
            splits[spec] = overlap.last_split
    variants: dict[str, Callable[[], object]] = {spec: partial(first_token, spec) for spec in specs}
    variants |= {f"{spec}, overlapped": partial(first_token, spec, "auto") for spec in splits}
    times = interleaved(variants, repeats=repeats, warmup=1, before=dist.barrier, after=dist.barrier, progress=progress)
    return {
        spec: Prefill(times[spec], wire, ran, times.get(f"{spec}, overlapped"), splits.get(spec))
        for spec, (wire, ran) in facts.items()
    }


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompt: str, tokens: int, streamer: Any = None) -> str:
    """Greedy continuation of `prompt`, without it."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    inputs = inputs.to(model.device)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=streamer)[0]
    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
