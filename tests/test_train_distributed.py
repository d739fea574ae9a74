"""Processes that torchrun starts again after one of them died."""

from concurrent.futures import ThreadPoolExecutor

from torch import distributed as dist

from fastmbconv.training import distributed


def test_a_restart_finds_nothing_of_the_dead_in_torchruns_store(monkeypatch):
    """Three attempts on one store, the first process early or late; each has a part of its own."""
    monkeypatch.setattr(distributed, "PAUSE", 0.001)
    store, found = dist.HashStore(), []
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1)):
        with ThreadPoolExecutor(3) as pool:
            running = {rank: pool.submit(distributed.unused, store, rank, 3) for rank in order}
        parts = [running[rank].result() for rank in range(3)]
        assert not parts[1].check(["address"])
        parts[0].set("address", str(order))
        assert {part.get("address") for part in parts} == {str(order).encode()}
        found.append(parts[2])
    assert len({part.get("address") for part in found}) == 3
