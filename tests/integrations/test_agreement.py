"""Ranks tell each other a word through a store that outlives them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from flashcomm.errors import TimedOut
from flashcomm.integrations.agreement import exchange


def together(store, words, timeout_s=20.0) -> list:
    """What each rank gets, or its error; a rank whose word is None does not come."""

    def one(rank):
        try:
            return exchange(store, rank, len(words), words[rank], timeout_s)
        except TimedOut as error:
            return str(error)

    with ThreadPoolExecutor(len(words)) as pool:
        tasks = [pool.submit(one, rank) if word is not None else None for rank, word in enumerate(words)]
        return [task and task.result() for task in tasks]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_rank_gets_every_word_however_often(ranks):
    store, names = dist.HashStore(), set()
    for turn in range(5):
        words = [f"turn {turn} of {rank}" for rank in range(ranks)]
        outcomes = together(store, words)
        assert [texts for texts, _ in outcomes] == [words] * ranks
        assert len({name for _, name in outcomes}) == 1
        names.add(outcomes[0][1])
    assert len(names) == 5


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_rank_that_does_not_come_is_an_error_and_does_no_harm_later(absent):
    store = dist.HashStore()
    for _ in range(2):
        words = [None if rank == absent else "old" for rank in range(3)]
        outcomes = together(store, words, timeout_s=0.2)
        assert all("did not come within 0.2 s" in text for rank, text in enumerate(outcomes) if rank != absent)
        if absent:
            assert f"rank {absent} did not come" in outcomes[0]
        assert [texts for texts, _ in together(store, ["a", "b", "c"])] == [["a", "b", "c"]] * 3
    # Of other numbers of ranks, too.
    for words in (["a", "b"], ["a", "b", "c", "d"]):
        assert [texts for texts, _ in together(store, words)] == [words] * len(words)


def test_ranks_that_hurry_wait_for_those_that_do_not():
    store, ranks, turns = dist.HashStore(), 3, 30
    seen: list = [[] for _ in range(ranks)]

    def go(rank):
        for turn in range(turns):
            seen[rank].append(exchange(store, rank, ranks, f"{turn} of {rank}", 60)[0])

    threads = [threading.Thread(target=go, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[[f"{turn} of {rank}" for rank in range(ranks)] for turn in range(turns)]] * ranks
