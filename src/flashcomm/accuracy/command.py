"""What `flashcomm accuracy` and `flashcomm tune-policy` do once their options are checked."""

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import flashcomm
from flashcomm import machine
from flashcomm.accuracy import report, tuning
from flashcomm.accuracy.measuring import measure
from flashcomm.accuracy.metrics import FLOOR, AccuracyRow, summarise
from flashcomm.bench.model import load
from flashcomm.bench.progress import progress
from flashcomm.bench.windows import windows
from flashcomm.calibration import Calibration
from flashcomm.lab.launch import Interrupted
from flashcomm.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Which model is measured on which text, as how many ranks."""

    directory: Path
    model: str
    """Its name in reports."""
    texts: Sequence[str]
    text: str
    """What the texts are, in reports."""
    ranks: int
    hosts: int
    algorithm: str
    tokens: int
    window: int
    dtype: str
    seed: int
    calibration: Path | None
    out: Path
    """Folder of reports, and of what an interrupted command goes on from."""

    def load(self) -> tuple[Any, list[torch.Tensor], str]:
        """(model, windows, what tells this model from others).

        Raises:
            ValueError: less text than two windows.
        """
        model, tokenizer = load(self.directory, getattr(torch, self.dtype))
        if torch.cuda.is_available():
            model = model.to("cuda")
        # Special tokens are part of the text, and a long one is no mistake here.
        ids = torch.cat([torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in self.texts])
        found = windows(ids, self.tokens, self.window)
        if len(found) < 2 or len(found[0]) < self.window:
            raise ValueError(
                f"{min(self.tokens, len(ids)):,} tokens of text: at least two windows of {self.window:,} are needed to "
                "say how certain the figures are. Give more text, or a smaller --window"
            )
        files = sorted(path for path in self.directory.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
        weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        versions = [flashcomm.__version__, torch.__version__, torch.get_num_threads(), str(model.device)]
        return model, found, json.dumps([weights, self.dtype, versions])

    def calibrated(self) -> Calibration | None:
        """What calibrated codecs are bound with."""
        return Calibration.load(self.calibration) if self.calibration else None

    def facts(self, tokens: int, seconds: float) -> dict:
        """What reports say about where figures come from."""
        return {
            "model": self.model,
            "ranks": self.ranks,
            "hosts": self.hosts,
            "algorithm": self.algorithm,
            "dtype": self.dtype,
            "text": self.text,
            "tokens": tokens,
            "window": self.window,
            "seed": self.seed,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time(), 1),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "machine": machine.describe(),
        }


def accuracy(setup: Setup, codecs: Sequence[str], policies: Sequence[Path]) -> tuple[list[AccuracyRow], dict]:
    """Measure codecs and policies; writes the reports into the folder and returns the rows and the document.

    Raises:
        Interrupted: Ctrl-C; what was found is kept.
        ValueError: what `Setup.load` and `measure` raise.
    """
    variants = {name: Policy(codec=name, algorithm=setup.algorithm) for name in (FLOOR, *codecs)}
    variants |= {path.stem: Policy.load(path) for path in policies}
    variants.pop("none", None)

    def run(step: Callable) -> tuple[list[AccuracyRow], dict]:
        start = time.perf_counter()
        model, texts, origin = setup.load()
        found = measure(
            model,
            setup.ranks,
            variants,
            texts,
            hosts=setup.hosts,
            calibration=setup.calibrated(),
            folder=setup.out / "windows",
            origin=origin,
            progress=step("accuracy", len(texts)),
        )
        rows = summarise(found.names, found.bits, found.figures, seed=setup.seed)
        facts = setup.facts(len(texts) * setup.window, time.perf_counter() - start)
        (setup.out / "report.md").write_text(report.markdown(rows, found, facts))
        (setup.out / "report.html").write_text(report.page(rows, found, facts))
        document = {
            "op": "accuracy",
            **facts,
            "rows": [row.as_dict() for row in rows],
            "sums": report.sums(found),
            "positions": report.positions(found),
        }
        _write(setup.out / "report.json", document)
        return rows, document

    return _interruptible(setup, run)


def tune_policy(
    setup: Setup, budget: float, candidates: Sequence[str], explored: int, path: Path
) -> tuple[tuning.Tuned, dict]:
    """Find a policy, write it with its evidence, and return what was found and the document.

    Args:
        setup: with the tokens to verify on.
        budget: KL in nats.
        candidates: codecs.
        explored: tokens to measure each codec at each sum on.
        path: of the policy.

    Raises:
        Interrupted: Ctrl-C; what was found is kept.
        ValueError: what `Setup.load` and `tuning.tune` raise.
    """

    def run(step: Callable) -> tuple[tuning.Tuned, dict]:
        start = time.perf_counter()
        model, texts, origin = setup.load()
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(setup.seed)).tolist()
        count = max(1, explored // setup.window)
        if len(texts) < count + 2:
            raise ValueError(
                f"{len(texts)} windows of text, of which {count} are explored: two more are needed to verify on. "
                "Give more text, or a smaller --window"
            )
        tuned = tuning.tune(
            model,
            setup.ranks,
            budget,
            [texts[i] for i in sorted(order[:count])],
            [texts[i] for i in sorted(order[count:])],
            candidates,
            algorithm=setup.algorithm,
            seed=setup.seed,
            folder=setup.out,
            step=step,
            hosts=setup.hosts,
            calibration=setup.calibrated(),
            origin=origin,
        )
        facts = setup.facts((len(texts) - count) * setup.window, time.perf_counter() - start)
        facts = {**facts, "explored_tokens": count * setup.window, "budget_kl": budget}
        tuned.policy.save(path, tuning.evidence(tuned, _sentences(facts)))
        names = {row.codec: row for row in (tuned.row, *tuned.uniform)}
        document = {
            "op": "tune-policy",
            **facts,
            "saved": tuned.saved,
            "best_uniform": tuned.best_uniform.codec,
            "rows": [row.as_dict() for row in names.values()],
            "sums": [
                {"module": m, "chosen": tuned.choice[m], "codec": c, "kl": kl}
                for m, each in tuned.costs.items()
                for c, kl in each.items()
            ],
        }
        _write(setup.out / "tuning.json", document)
        return tuned, document

    return _interruptible(setup, run)


def _sentences(facts: dict) -> list[str]:
    machine = facts["machine"]
    return [
        f"{facts['model']} in {facts['dtype']} as {facts['ranks']} ranks, {facts['algorithm']}; by flashcomm "
        f"tune-policy, seed {facts['seed']}",
        f"{machine['gpu'] or machine['cpu']}, {machine['date']}, torch {machine['versions']['torch']}",
        f"budget: KL {facts['budget_kl']:g}, on {facts['tokens']:,} tokens of {facts['text']}; "
        f"sums explored on {facts['explored_tokens']:,} others",
    ]


def _interruptible(setup: Setup, run: Callable) -> Any:
    setup.out.mkdir(parents=True, exist_ok=True)
    try:
        with progress() as step:
            return run(step)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the same command goes on from what is in {setup.out}") from None


def _write(path: Path, document: dict):
    path.write_text(json.dumps(document, indent=1) + "\n")
