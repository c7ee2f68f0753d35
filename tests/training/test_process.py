import pytest
import torch
from torch import nn

from fastvitc.errors import UsageError
from fastvitc.training.process import pick_device, process_group


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["gpu", "cpu:x", "mps", "meta", ""])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(UsageError, match=f"unknown device '{name}'; use auto, cpu or cuda"):
        pick_device(name)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(name):
    with pytest.raises(UsageError, match=f"device '{name}' was asked for, but PyTorch finds no CUDA device"):
        pick_device(name)


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_without_a_gpu():
    assert pick_device("auto") == torch.device("cpu")


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("world_size", [None, "1"])
def test_a_process_alone_is_the_main_one_of_one(world_size, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with process_group("cpu") as process:
        assert (process.rank, process.world_size, process.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()


def test_collectives_of_a_process_alone_change_nothing():
    with process_group("cpu") as process:
        assert process.sum(torch.tensor(3.0)) == 3
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(5)
        process.average_statistics(norm)
        assert (norm.running_mean == 5).all()
