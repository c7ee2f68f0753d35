"""Contenders that add nothing up, for the tests of bench.gpu."""

from pathlib import Path

import torch

from bench.contest import Candidate, Contest
from bench.gpu.measure import Patience

ROOT = Path(__file__).parents[2]
TRUTH = torch.tensor([3.0, 4.0])
PATIENCE = Patience(passes=3, seconds=0.0, calls=(1, 1))
CPU = torch.device("cpu")


def candidate(run=lambda: None, result=TRUTH):
    return lambda: Candidate(run=run, tensors=lambda: [result])


def failing(error=None):
    def build():
        raise error or RuntimeError("no such\ninstruction")

    return build


def contest(contenders, truth=lambda: [TRUTH]):
    return Contest("sum", truth, contenders, flops=8, images=2)


class Measurer:
    """In place of the process: measures nothing; `then` is called with the number of entries so far."""

    def __init__(self, then=lambda count: None):
        self.count, self.then = 0, then

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, entry, seconds, left):
        self.count += 1
        self.then(self.count)
        return {"state": "measured", "contenders": {}}
