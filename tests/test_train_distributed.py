"""Processes that torchrun starts again after one of them died."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import distributed as dist

from fastmbconv.training import distributed
from fastmbconv.training.errors import TrainingError


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


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_a_dead_process_gives_up(rank, monkeypatch):
    monkeypatch.setattr(distributed, "PAUSE", 0.001)
    monkeypatch.setattr(distributed, "PATIENCE", 0.05)
    store = dist.HashStore()
    for name in ("name/0", "name/1", "names"):
        store.set(name, "dead")
    with pytest.raises(TrainingError, match="not all 2 processes came within 0.05 s"):
        distributed.unused(store, rank, 2)


def test_half_of_torchruns_variables_are_refused(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = "RANK, MASTER_ADDR, MASTER_PORT not set: start with torchrun"
    with pytest.raises(TrainingError, match=told), distributed.world("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.world("cpu") as alone:
        assert alone == distributed.World(torch.device("cpu"))
