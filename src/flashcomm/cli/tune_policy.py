"""`flashcomm tune-policy`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashcomm.cli.base import Algorithm, Calibration, Json, ModelDtype, codec_list, fail, stdout
from flashcomm.cli.simulation import Hosts, Model, Seed, SimulatedRanks, Texts, Window, setup
from flashcomm.report.rows import write_json

if TYPE_CHECKING:
    from flashcomm.accuracy.setup import Setup
    from flashcomm.accuracy.tuning import Tuned
    from flashcomm.report.progress import Step


CODECS = ",".join(
    [f"ec{eighths / 8:g}" for eighths in range(20, 65)]
    + [f"int{bits}g128{transform}" for bits in (4, 6, 8) for transform in ("", "+hadamard")]
)
"""Codecs to choose from: nearly any number of bits, and the formats for fast links."""


def tune_policy(
    model: Model = Path("demo"),
    budget: Annotated[str, typer.Option(help="Accuracy that the policy may cost: kl=NATS.")] = "kl=0.01",
    tp: SimulatedRanks = 8,
    codecs: Annotated[
        str,
        typer.Option(
            help="Comma-separated codecs to choose from. Give the int formats with +hadamard where the link is fast.",
            show_default="ec2.5 to ec8 in eighths of a bit, int4g128, int6g128, int8g128, each with +hadamard too",
        ),
    ] = CODECS,
    algorithm: Algorithm = "auto",
    hosts: Hosts = 0,
    text: Texts = None,
    explore: Annotated[int, typer.Option(help="Tokens to predict the cost of each codec on.", min=16)] = 2048,
    tokens: Annotated[int, typer.Option(help="Further tokens, to measure whole policies on.", min=32)] = 8192,
    window: Window = 1024,
    dtype: ModelDtype = "auto",
    calibration: Calibration = None,
    seed: Seed = 0,
    policy: Annotated[Path, typer.Option(help="The file to write.", dir_okay=False)] = Path("policy.toml"),
    out: Annotated[
        Path, typer.Option(help="Folder for tuning.json, from which an interrupted run goes on.", file_okay=False)
    ] = Path("flashcomm-tuning"),
    json_file: Json = None,
):
    """Find the codecs that send the fewest bits within a budget of accuracy, sum by sum, and write a policy file."""
    specs = codec_list(codecs)
    name, _, limit = budget.partition("=")
    try:
        nats = float(limit)
    except ValueError:
        nats = 0.0
    if name.strip() != "kl" or not nats > 0:
        fail(f"--budget {budget!r}: give kl= and a number of nats above 0, such as kl=0.01")
    given = setup(
        model, specs, text, tp=tp, hosts=hosts, algorithm=algorithm, tokens=tokens + explore, window=window,
        dtype=dtype, calibration=calibration, seed=seed, out=out,
    )  # fmt: skip
    try:
        tuned, document = given.keep(lambda step: _tune(given, nats, specs, explore, policy, step))
    except (ValueError, NotImplementedError) as error:
        fail(str(error))
    for line in policy.read_text().split("\n\n")[0].splitlines():
        stdout.print(line, highlight=False, soft_wrap=True)
    write_json(json_file, document)
    stdout.print(f"{policy}: {tuned.policy}", highlight=False, soft_wrap=True)


def _tune(
    given: "Setup", budget: float, candidates: list[str], explored: int, path: Path, step: "Step"
) -> "tuple[Tuned, dict]":
    """Find a policy and write it to `path` with its evidence; returns it and the document of ``tuning.json``."""
    import torch

    from flashcomm.accuracy import tuning

    start = time.perf_counter()
    model, texts, origin = given.load()
    order = torch.randperm(
        len(texts), generator=torch.Generator().manual_seed(given.seed), dtype=torch.long, device="cpu"
    ).tolist()
    count = max(1, explored // given.window)
    if len(texts) < count + 2:
        raise ValueError(
            f"{len(texts)} windows of text, of which {count} are explored: two more are needed to verify on. "
            "Give more text, or a smaller --window"
        )
    tuned = tuning.tune(
        model,
        given.ranks,
        budget,
        [texts[i] for i in sorted(order[:count])],
        [texts[i] for i in sorted(order[count:])],
        candidates,
        algorithm=given.algorithm,
        seed=given.seed,
        folder=given.out,
        step=step,
        hosts=given.hosts,
        calibration=given.calibrated(),
        origin=origin,
    )
    facts = given.facts((len(texts) - count) * given.window, time.perf_counter() - start)
    facts |= {"explored_tokens": count * given.window, "budget_kl": budget}
    tuned.policy.save(path, tuning.evidence(tuned, _sentences(facts)))
    document = {"op": "tune-policy", **facts, **tuning.document(tuned)}
    write_json(given.out / "tuning.json", document)
    return tuned, document


def _sentences(facts: dict) -> list[str]:
    machine = facts["machine"]
    return [
        f"{facts['model']} in {facts['dtype']} as {facts['ranks']} ranks, {facts['algorithm']}; by flashcomm "
        f"tune-policy, seed {facts['seed']}",
        f"{machine['gpu'] or machine['cpu']}, {machine['date']}, torch {machine['versions']['torch']}",
        f"budget: KL {facts['budget_kl']:g}, on {facts['tokens']:,} tokens of {facts['text']}; "
        f"sums explored on {facts['explored_tokens']:,} others",
    ]
