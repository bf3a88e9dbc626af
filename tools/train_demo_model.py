"""Train the small Llama model that the demo, the tests and the benchmarks use.

    python tools/train_demo_model.py --compile                         # what made the bundled model
    python tools/train_demo_model.py --out /tmp/model --minutes 30     # a weaker one, on a CPU

The corpus is the Python standard library's own source, so nothing is downloaded; ``flashcomm.models.text`` says
which files. ``--out`` receives a Hugging Face model folder, bf16 weights and a byte-level BPE tokenizer, with a
record of the run: ``training.json`` and ``loss.png``.

Held-out loss is over the whole held-out stream in non-overlapping windows of the full context: every token but
the very first is predicted once. The figures in ``training.json`` are those of the saved weights, read back.

Shapes: B sequences, T tokens of context, V vocabulary size.
"""

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import tokenizers
import torch
import torch.nn.functional as F
import transformers
import typer
from matplotlib.figure import Figure
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from flashcomm.models import text

CONTEXT = 2048
VOCABULARY = 4096

#: Sequences in one forward pass: the logits take B * T * V * 4 bytes, several times over.
SEQUENCES_PER_PASS = {"cuda": 32, "cpu": 2}

SAMPLE_PROMPTS = ("def read_", "class Test", "import os\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The recipe. ``minutes`` bounds the time after the first step, which may have to compile."""

    steps: int
    batch_tokens: int
    rate: float
    weight_decay: float
    minutes: float
    evaluations: int
    seed: int
    compiled: bool


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of V tokens; as all 256 bytes are among them, any text round-trips."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[text.END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=text.END_OF_TEXT,
        eos_token=text.END_OF_TEXT,
        pad_token=text.END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return the texts as one int64 stream on the CPU, an end-of-text token before each and after the last."""
    end = tokenizer.eos_token_id
    ids = [end]
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids += [*encoding.ids, end]
    return torch.tensor(ids)


def batches(stream: torch.Tensor, sequences: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield (sequences, T + 1) windows of ``stream`` for ever.

    Within an epoch no token is an input twice. Each epoch cuts the stream at another offset, takes the windows in
    another order and drops those that do not fill a batch.
    """
    if len(stream) < (sequences + 1) * CONTEXT:
        raise ValueError(
            f"{len(stream)} tokens do not fill a batch of {sequences} sequences: use a smaller --batch-tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - CONTEXT, CONTEXT)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chunk in starts.split(sequences):
            if len(chunk) == sequences:
                index = chunk[:, None] + torch.arange(CONTEXT + 1)
                yield stream[index.to(stream.device)]


def total_loss(model: LlamaForCausalLM, window: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy, in nats, of each token of the (B, T + 1) ``window`` but the first."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum")


@torch.inference_mode()
def stream_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Return the mean loss, in nats per token, over ``stream`` in non-overlapping windows of T tokens."""
    full = (len(stream) - 1) // CONTEXT
    index = torch.arange(full)[:, None] * CONTEXT + torch.arange(CONTEXT + 1)
    windows = [stream[i.to(stream.device)] for i in index.split(SEQUENCES_PER_PASS[stream.device.type])]
    last = stream[full * CONTEXT :]
    if len(last) > 1:
        windows.append(last[None])
    return sum(total_loss(model, window).item() for window in windows) / (len(stream) - 1)


def unigram_loss(training: torch.Tensor, held_out: torch.Tensor) -> float:
    """Return the nats per held-out token of the training frequencies, add-one smoothed."""
    counts = torch.bincount(training.cpu(), minlength=VOCABULARY).double() + 1
    return -(counts / counts.sum()).log()[held_out[1:].cpu()].mean().item()


def learning_rate(done: float, peak: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Return the rate after the fraction ``done``: linear warm-up, then cosine to ``floor * peak``."""
    if done < warmup:
        return peak * max(done, 1e-4) / warmup
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))))


def adamw(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW over the fp32 master weights; the norms' gains are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(model: LlamaForCausalLM, training: torch.Tensor, held_out: torch.Tensor, recipe: Recipe) -> list[dict]:
    """Train ``model`` in place; return rows of step, training loss since the last row, held-out loss, seconds.

    Where the time limit would end the run before ``recipe.steps``, the learning rate falls with the time instead,
    so a run that is cut short ends at the floor too.
    """
    device = training.device.type
    forward = torch.compile(model) if recipe.compiled else model
    autocast = torch.autocast(device, dtype=torch.bfloat16)
    optimizer = adamw(model, recipe.weight_decay)
    source = batches(training, recipe.batch_tokens // CONTEXT, recipe.seed)
    rows, running, since, step, done, start = [], torch.zeros((), device=device), 0, 0, 0.0, 0.0
    columns = [TextColumn("training"), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("training", total=recipe.steps)
        while done < 1:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, recipe.rate)
            batch = next(source)
            for part in batch.split(SEQUENCES_PER_PASS[device]):
                with autocast:
                    loss = total_loss(forward, part) / batch[:, 1:].numel()
                loss.backward()
                running += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, since = step + 1, since + 1
            start = start or time.monotonic()
            seconds = time.monotonic() - start
            done = max(step / recipe.steps, seconds / (60 * recipe.minutes))
            progress.update(task, completed=step)
            if done >= (len(rows) + 1) / recipe.evaluations or done >= 1:
                with autocast:
                    losses = {
                        "training_loss": running.item() / since,
                        "held_out_loss": stream_loss(model, held_out),
                    }
                losses = {name: round(loss, 4) for name, loss in losses.items()}
                rows.append({"step": step, **losses, "seconds": round(seconds, 1)})
                progress.console.print(json.dumps(rows[-1]), soft_wrap=True, highlight=False)
                running.zero_()
                since = 0
    return rows


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model, in bf16, and its tokenizer as a Hugging Face folder."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Transformers 5 writes a class name that version 4 does not know; both know this one.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def figures(model: LlamaForCausalLM, training: torch.Tensor, held_out: torch.Tensor, held_out_bytes: int) -> dict:
    """Return loss, perplexity and bits per byte of the held-out stream, of the model and of the unigram."""
    # The end-of-text tokens between files cost bits but stand for no byte.
    bits_per_byte = (len(held_out) - 1) / held_out_bytes / math.log(2)
    row = {}
    losses = {"held_out": stream_loss(model, held_out), "unigram": unigram_loss(training, held_out)}
    for name, loss in losses.items():
        row |= {f"{name}_loss": round(loss, 4), f"{name}_perplexity": round(math.exp(loss), 2)}
        row |= {f"{name}_bits_per_byte": round(loss * bits_per_byte, 4)}
    return row


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Return ``prompt`` and 120 tokens more: temperature 0.8, the 40 likeliest tokens, a fixed seed."""
    torch.manual_seed(0)
    ids = tokenizer(text.END_OF_TEXT + prompt, return_tensors="pt").input_ids.to(model.device)
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=120, do_sample=True, temperature=0.8, top_k=40)
    return tokenizer.decode(output[0, 1:])


def plot(rows: list[dict], unigram: float, path: Path) -> None:
    """Draw the training and held-out loss over the steps, and the unigram's."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("training_loss", "training"), ("held_out_loss", "held out")):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label)
    axes.axhline(unigram, color="grey", linestyle=":", label="unigram, held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def describe(texts: list[str], stream: torch.Tensor) -> dict[str, int]:
    """Return the size of a part of the corpus in files, UTF-8 bytes and tokens."""
    return {"files": len(texts), "bytes": sum(len(t.encode()) for t in texts), "tokens": len(stream)}


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("packages/demo-model/flashcomm_demo_model"),
    source: Annotated[Path | None, typer.Option(help="Standard library; default: this Python's.")] = None,
    corpus: Annotated[str, typer.Option(help="Its name in the record.")] = f"CPython {platform.python_version()}",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3200,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step, a multiple of 2048.")] = 32768,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on the matrices only.")] = 0.5,
    minutes: Annotated[float, typer.Option(help="Time limit.")] = math.inf,
    evaluations: Annotated[int, typer.Option(help="Measurements of the held-out loss.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile; needs a C compiler.")] = False,
) -> None:
    """Train the demo's model on the Python standard library and write it with a record of the run."""
    if batch_tokens < CONTEXT or batch_tokens % CONTEXT:
        raise typer.BadParameter(f"--batch-tokens {batch_tokens}: give a multiple of {CONTEXT}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if device not in SEQUENCES_PER_PASS:
        raise typer.BadParameter(f"--device {device}: give auto, {' or '.join(SEQUENCES_PER_PASS)}")
    recipe = Recipe(
        steps=steps,
        batch_tokens=batch_tokens,
        rate=rate,
        weight_decay=weight_decay,
        minutes=minutes,
        evaluations=evaluations,
        seed=seed,
        compiled=compiled,
    )
    training_texts, held_out_texts = (
        text.read(text.training_files(source)),
        text.read(text.held_out_files(source)),
    )
    tokenizer = train_tokenizer(training_texts)
    training, held_out = (token_stream(tokenizer, part).to(device) for part in (training_texts, held_out_texts))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    sizes = {
        "name": corpus,
        "training": describe(training_texts, training),
        "held_out": describe(held_out_texts, held_out) | {"modules": list(text.HELD_OUT)},
    }
    print(json.dumps({"parameters": model.num_parameters(), "corpus": sizes}), flush=True)
    rows = train(model, training, held_out, recipe)
    save(model, tokenizer, out)

    # Measured on what was saved, in fp32 arithmetic, so that the figures can be repeated on any machine.
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    record = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "parameters": model.num_parameters(),
        "corpus": sizes,
        "recipe": {name: value for name, value in asdict(recipe).items() if value != math.inf},
        "trained_steps": rows[-1]["step"],
        "trained_tokens": rows[-1]["step"] * batch_tokens,
        "trained_epochs": round(rows[-1]["step"] * batch_tokens / len(training), 1),
        "training_seconds": rows[-1]["seconds"],
        "final_training_loss": rows[-1]["training_loss"],
        "figures": figures(model, training, held_out, sizes["held_out"]["bytes"]),
        "samples": [sample(model, tokenizer, prompt) for prompt in SAMPLE_PROMPTS],
        "curve": rows,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(rows, record["figures"]["unigram_loss"], out / "loss.png")
    print(json.dumps({key: record[key] for key in ("final_training_loss", "figures")}, indent=1))
    print(*record["samples"], sep="\n----\n")


if __name__ == "__main__":
    typer.run(main)
