"""The command line of lm-evaluation-harness on compressed models, with a task from files of this machine."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from flashcomm.demo import MODEL
from flashcomm.models import text

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install 'lm-eval[hf]'")

TASK = """\
task: held_out
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def evaluated(folder, codec: str):
    """The harness's exit status, output, and bits per byte."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "flashcomm.integrations.lm_eval", "run", "--model", "flashcomm"]
    command += ["--model_args", f"pretrained={MODEL},codec={codec},max_length=512", "--tasks", "held_out"]
    command += ["--include_path", str(folder), "--batch_size", "1", "--output_path", str(folder / codec)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    files = list((folder / codec).rglob("results_*.json"))
    figure = json.loads(files[0].read_text())["results"]["held_out"]["bits_per_byte,none"] if files else None
    return done, figure


@pytest.fixture
def folder(tmp_path):
    documents = text.held_out_text()[:6000]
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": documents}) + "\n")
    (tmp_path / "held_out.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    return tmp_path


def test_the_harness_tells_codecs_apart(folder):
    figures = {}
    for codec in ("int8g128", "int2g32"):
        done, figures[codec] = evaluated(folder, codec)
        assert done.returncode == 0, done.stderr
        assert f"flashcomm: {{'all_reduce/one_step/{codec}':" in done.stdout
        # One table, not one from each rank.
        assert done.stdout.count("bits_per_byte") == 1, done.stdout
    assert figures["int8g128"] < figures["int2g32"]


def test_wrong_arguments_are_refused_before_a_model_is_loaded():
    from flashcomm.integrations.lm_eval import model_class

    with pytest.raises(ValueError, match="unknown codec 'int9'"):
        model_class()(str(MODEL), codec="int9")
    with pytest.raises(ValueError, match="one process sends nothing: start this with torchrun"):
        model_class()(str(MODEL))
