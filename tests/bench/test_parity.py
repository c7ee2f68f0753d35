from dataclasses import replace

import pytest
import torch

from bench import test_ops
from bench.contest import Arena
from fastvitc.models.config import preset

CONFIG = replace(preset("vitc_nano"), depth=1)
CONTESTS = {"add_layer_norm": test_ops.add_layer_norm_contests, "bias_gelu": test_ops.bias_gelu_contests}


def contests(op, dtype):
    return CONTESTS[op]("nano", CONFIG, 2, torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", CONTESTS)
def test_every_eager_contender_gives_the_references_results(op, dtype):
    for contest in contests(op, dtype):
        arena = Arena()
        for name in contest.contenders:
            if not name.endswith("compiled"):
                _, error = arena.enter(contest, name)
                assert error < (1e-5 if dtype == torch.float32 else 1e-2), name


@pytest.mark.parametrize("op", CONTESTS)
def test_pytorchs_own_ops_are_a_peer_of_each_op(op):
    for contest in contests(op, torch.bfloat16):
        peers = [name for name in contest.contenders if not name.startswith("fastvitc")]
        assert len(peers) == 2  # eager and compiled


@pytest.mark.parametrize(
    ("op", "dtype", "per_element"),
    [
        ("add_layer_norm", torch.bfloat16, (12, 28)),
        ("add_layer_norm", torch.float32, (16, 32)),
        ("bias_gelu", torch.bfloat16, (4, 10)),
    ],
)
def test_the_counted_bytes_are_those_of_the_ops_docstring(op, dtype, per_element):
    width = CONFIG.width if op == "add_layer_norm" else CONFIG.mlp_width
    elements = 2 * CONFIG.tokens * width
    assert tuple(contest.bytes / elements for contest in contests(op, dtype)) == per_element
