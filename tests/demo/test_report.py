"""The demo names the links that it ran on."""

import pytest

pytest.importorskip("greenlet", reason="pip install greenlet")
from flashcomm.demo import report


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({}, "there is no slow link here for compression to speed up"),
        ({"rate": "1gbit", "ranks_per_host": 1}, "run on 4 hosts, each behind a link of 1gbit: network namespaces"),
        ({"rate": "none", "ranks_per_host": 2}, "run on 2 hosts of 2 ranks, each behind an unlimited link"),
    ],
)
def test_the_link_is_named(facts, sentence):
    assert sentence in report.link({"ranks": 4, **facts})
