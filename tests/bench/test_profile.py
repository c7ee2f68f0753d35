from dataclasses import replace

import pytest

from bench import profile
from fastvitc.models.complexity import complexity
from fastvitc.models.config import preset

CONFIG = replace(preset("vitc_nano"), depth=1, num_classes=10)
CLOSE = {"rel": 1e-9}


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=[pytest.mark.full, pytest.mark.slow])],
    ids=["eager", "compiled"],
)
def rows(request):
    return {row.group: row for row in profile.profile(CONFIG, 2, "auto", request.param, peak=1e12)}


def test_the_shares_of_a_step_sum_to_one(rows):
    assert sum(row.share for row in rows.values()) == pytest.approx(1, **CLOSE)


def test_every_group_takes_part_in_a_step(rows):
    groups = {"optimiser", "other", *profile._GROUPS}
    assert rows.keys() == groups
    assert all(row.seconds > 0 for row in rows.values())


def test_the_flops_of_a_step_are_those_of_the_groups_that_multiply_matrices(rows):
    counted = {group: row for group, row in rows.items() if row.peak_share is not None}
    assert counted.keys() == {"attention", "convolutions", "linear layers"}
    flops = sum(row.peak_share * row.seconds * 1e12 for row in counted.values())
    assert flops == pytest.approx(2 * 3 * 2 * complexity(CONFIG).flops, **CLOSE)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["aten::addmm", "aten::linear"], "linear layers"),
        (["aten::sum", "autograd::engine::evaluate_function: AddmmBackward0"], "linear layers"),
        (["aten::copy_", "aten::_to_copy", "aten::to", "aten::linear"], "casts and copies"),
        (["aten::bmm", "aten::matmul"], "attention"),
        (["fastvitc_native::attention_backward", "fastvitc::attention_backward"], "attention"),
        (["graph_0_cpp_fused_convolution_native_batch_norm_relu_2"], "norm and activation of the stem"),
        (["graph_0_cpp_fused__to_copy_add_native_layer_norm_3"], "LayerNorm"),
        (["aten::gelu_backward"], "GELU"),
        (["aten::convolution_backward"], "convolutions"),
        (["aten::_log_softmax", "aten::log_softmax", "aten::cross_entropy_loss"], "other"),
        (["aten::copy_", "aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimiser"),
    ],
)
def test_an_operation_belongs_to_its_own_group_or_that_of_the_nearest_around_it(names, group):
    assert profile.group_of([*names, "training step"]) == group


def test_main_prints_the_groups_and_the_whole_step(capsys, monkeypatch):
    monkeypatch.setattr(profile, "matmul_peak", lambda device, dtype: 1e12)
    profile.main(["--model", "vitc_nano", "--batch-size", "1"])
    out = capsys.readouterr().out
    assert "Training step of vitc_nano, backend auto, dtype bf16, batch 1." in out
    assert "| linear layers |" in out
    assert out.splitlines()[-1].startswith("| the step |")
    assert "100.0%" in out.splitlines()[-1]
