"""`flashcomm plan` as a user runs it, its files, and the measurements of `flashcomm tune --save` for it."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

import ranks
from flashcomm.cli import app
from flashcomm.cli.plan import draw
from flashcomm.planner import Facts, LinkCosts, advice
from flashcomm.planner.costs import Cost, Point
from flashcomm.planner.hardware import cluster
from flashcomm.planner.overlap import Line
from flashcomm.policy import Policy

SLOW = ("llama-3-70b", "l40")
OPTIONS = dict(ranks=4, tokens=1024, rows=8, link="pcie4-sys")


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_the_command_prints_advises_and_writes(tmp_path):
    policy, document = tmp_path / "policy.toml", tmp_path / "plan.json"
    done = run("llama-3-70b", "--machine", "l40", "--link", "pcie4-sys", "--prompt", 1024, "--batch", 8,
               "--policy", policy, "--json", document)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "int8g128 makes the first token" in done.stdout
    written = json.loads(document.read_text())
    assert [row["codec"] for row in written["rows"]][:2] == ["none", "int8g128"]
    assert {"compute_ms", "sums_ms", "ttft_ms", "overlapped_ttft_ms", "share", "parts"} <= set(written["rows"][0])
    assert (written["ranks"], written["prompt"], written["batch"]) == (4, 1024, 8)
    loaded = Policy.load(policy)
    assert (loaded.codec, loaded.min_bytes) == (written["advice"]["codec"], written["advice"]["min_bytes"])
    assert "# flashcomm plan: llama-3-70b, 4 x l40" in policy.read_text()


def test_the_command_says_what_is_wrong():
    done = run("llama-3-70b", "--machine", "l400")
    assert done.exit_code == 2
    assert "unknown machine 'l400'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("model", "machine", "options", "message"),
    [
        ("nothing", "l40", {}, "unknown model 'nothing'"),
        ("llama-3-8b", "l40", {"tokens": 0}, "prompt 0: give 1 or more"),
        ("llama-3-8b", "l40", {"rows": 0}, "batch 0: give 1 or more"),
        ("llama-3-8b", "l40", {"codecs": ["int4g128+keep64"]}, "needs a calibration of a model"),
        ("llama-3-8b", "none.json", {}, "cannot read 'none.json'.*tune --save none.json"),
        ("llama-3-8b", "none.json", {"rate": "1gbit"}, "--rate with none.json"),
    ],
)
def test_arguments_are_checked(model, machine, options, message):
    with pytest.raises(ValueError, match=message):
        advice.plan(model, machine, **options)


def test_a_measured_machine_is_planned_for_with_its_own_ranks(tmp_path):
    path = tmp_path / "here.json"
    path.write_text(json.dumps(cluster("l40", 4, link="pcie4-sys").as_dict()))
    named = advice.plan(*SLOW, **OPTIONS)
    measured = advice.plan("llama-3-70b", str(path), tokens=1024, rows=8)
    assert measured.predictions[1].ttft_s == pytest.approx(named.predictions[1].ttft_s)
    assert measured.cluster.facts == (f"measured: {path}",)
    with pytest.raises(ValueError, match=r"--tp 8 with .*here.json, which was measured on 4 ranks"):
        advice.plan("llama-3-70b", str(path), ranks=8)


def test_the_policy_says_what_the_advice_says():
    policy, comments = advice.policy_of(advice.plan(*SLOW, **OPTIONS))
    assert policy.codec == "int8g128"
    assert any("predicted, not measured" in line for line in comments)
    assert any("NVIDIA L40 data sheet" in line for line in comments)
    plain, _ = advice.policy_of(advice.plan("llama-2-7b", "h20", ranks=2, rows=4))
    assert plain.codec == "none"


def test_the_engine_says_whether_prompts_run_in_parts():
    slow = advice.plan("llama-3-8b", "cpu-10gbe", ranks=2, rate="200mbit", tokens=1024)
    assert len(slow.advice.parts) > 1
    assert advice.overlap_in("transformers", slow) == ("off", [])
    overlap, (why,) = advice.overlap_in("vllm", slow)
    assert overlap == advice.policy_of(slow, overlap)[0].overlap == "auto"
    assert "FLASHCOMM_OVERLAP=auto" in why
    gpus = advice.plan(*SLOW, **OPTIONS)
    assert len(gpus.advice.parts) > 1
    overlap, (why,) = advice.overlap_in("vllm", gpus)
    assert overlap == "off"
    assert "no GPU has run this" in why
    with pytest.raises(ValueError, match="--engine sglang: use transformers or vllm"):
        advice.overlap_in("sglang", slow)


def test_heads_that_ranks_do_not_divide_are_noted():
    assert advice.plan("llama-3-8b", "h100", ranks=1024).notes == ["32 heads do not divide by 1024: as if they did"]


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'flashcomm[plot]'")
    path = tmp_path / "folder" / "plan.png"
    draw(advice.plan(*SLOW, **{**OPTIONS, "codecs": ["int8g128"]}), "l40", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"--plot with here.json: other ranks and rates were not measured"):
        draw(advice.plan(*SLOW, **OPTIONS), "here.json", path)


def computes():
    from flashcomm.bench import compute

    cost = Cost((Point(1024, 1e-3, 0.0),))
    compute.LENGTHS, compute._REPEATS = (32, 64, 128), 1
    compute.PROBE = dataclasses.replace(compute.PROBE, layers=2, hidden=256, intermediate=512)
    return compute.computed(Facts(ranks=2, costs=LinkCosts(name="here", plain=cost))).as_dict()


def test_what_ranks_compute_is_measured_alike_on_all_of_them():
    pytest.importorskip("transformers", reason="pip install 'flashcomm[transformers]'")
    one, other = ranks.shared(2).run(computes)
    assert one == other
    # Prompts this short tell how slow the rates are at least; noise may hide what either part of a token costs.
    assert one["flops"] > 1e8
    assert one["bytes_s"] > 1e7
    assert one["attention_flops"] > 1e8
    assert (one["ranks"], one["skips"]) == (2, "first")


def test_noise_that_hides_the_cost_of_a_token_leaves_rates():
    from flashcomm.bench import compute

    constant = Line(fixed_s=1.0)
    segments = [(share, compute._token_s(constant)) for share in (compute.PROBE.attention(1), compute.PROBE.mlp(1))]
    assert min(compute._rates(*segments)) > 0


def test_a_measured_machine_is_a_json_file():
    done = CliRunner().invoke(app, ["tune", "--save", "here.toml"])
    assert done.exit_code == 2
    assert "--save 'here.toml': give a file that ends in .json" in done.stderr
