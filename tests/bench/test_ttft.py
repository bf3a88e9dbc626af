"""The figures behind the table and the timeline of `flashcomm bench ttft`."""

import itertools
import json

import pytest
import torch

pytest.importorskip("greenlet", reason="pip install greenlet")
import ranks
from flashcomm.bench import ttft
from flashcomm.demo import MODEL
from flashcomm.integrations.transformers import compress
from flashcomm.models.random import random_model
from flashcomm.overlap import wrap
from flashcomm.parts.measuring import PartTimes


def test_compute_is_the_slowest_ranks_and_a_sum_the_shortest():
    early, late = PartTimes([1.0, 2.0, 1.0], [5.0, 1.0]), PartTimes([3.0, 2.5, 1.0], [3.0, 1.5])
    assert ttft._shared([early, late]) == (6.5, 4.0, 4.0)


@pytest.mark.parametrize("config", ["llama-160m"])
def test_a_random_model_has_the_shape_that_its_name_says(config):
    pytest.importorskip("transformers", reason="pip install 'flashcomm[transformers]'")
    with random_model(config, torch.bfloat16) as folder:
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        million = (folder / "model.safetensors").stat().st_size / 2e6
        assert 155 < million < 170
    assert not folder.exists()


def timelines():
    from flashcomm.models.load import load_model

    model = load_model(MODEL, torch.float32)
    handle = compress(model, "none")
    runs = ttft._Runs(model, handle, wrap(model), 256)
    whole, parts = runs.timeline("none", 1), runs.timeline("none", 2)
    handle.undo()
    return whole, parts


def test_a_timeline_has_every_segment_and_every_sum():
    pytest.importorskip("transformers", reason="pip install 'flashcomm[transformers]'")
    for whole, parts in ranks.shared(2).run(timelines):
        for spans, count in ((whole, 1), (parts, 2)):
            assert {span.part for span in spans} == set(range(count))
            for rank in range(2):
                core = [span for span in spans if (span.rank, span.lane) == (rank, "core")]
                link = [span for span in spans if (span.rank, span.lane) == (rank, "link")]
                # 17 sums for each part; what follows the last one is a segment too.
                assert len(core) == 17 * count + 1
                assert len(link) == 17 * count
                for lane in (core, link):
                    assert all(one.end_s <= other.start_s for one, other in itertools.pairwise(lane))
        # While one part is on the link, the other computes, which one piece cannot.
        core, link = ([s for s in parts if (s.rank, s.lane) == (0, lane)] for lane in ("core", "link"))
        assert any(c.part != t.part and c.start_s < t.end_s and t.start_s < c.end_s for c in core for t in link)
        core, link = ([s for s in whole if (s.rank, s.lane) == (0, lane)] for lane in ("core", "link"))
        assert not any(c.start_s < t.start_s < c.end_s for c in core for t in link)
