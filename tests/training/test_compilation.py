from dataclasses import replace

import pytest
import torch
from small_models import small, triple

from fastvitc.data import synthetic_index
from fastvitc.training import assembly
from fastvitc.training.assembly import assemble
from fastvitc.training.compilation import mark_of, seconds_of_a_pass, where_it_pays
from fastvitc.training.process import Process
from fastvitc.training.recipes import recipe_settings
from fastvitc.training.schedule import Curriculum
from fastvitc.training.step import Objective
from fastvitc.training.words import introduction, yardstick

CPU = torch.device("cpu")


def parts_of(**changes):
    settings = recipe_settings("digits").changed(
        loader="synthetic", batch_size=4, peak_tflops=1.0, threads=None, precision="fp32", epochs=2
    )
    images = (synthetic_index(split, 8, 3) for split in ("train", "val"))
    return assemble(settings.changed(**changes), Process(0, 1, CPU), *images)


def test_a_short_run_is_not_compiled_and_a_long_one_is():
    short, long = where_it_pays(CPU, 60.0, 1), where_it_pays(CPU, 3600.0, 1)
    assert (short.compile, long.compile) == (False, True)
    assert "the steps take about 1 min without" in short.why
    assert "--compile chooses otherwise" in short.why
    assert "--no-compile chooses otherwise" in long.why


def test_each_size_of_images_has_to_be_compiled():
    assert where_it_pays(CPU, 900.0, 1).compile
    assert not where_it_pays(CPU, 900.0, 3).compile


def test_a_run_chooses_by_its_own_steps_says_why_and_keeps_the_choice(monkeypatch, tmp_path):
    monkeypatch.setattr(assembly, "can_compile", lambda: True)
    seconds, seen = [0.1], []

    def measured(objective, batch):
        seen.append(tuple(batch[0].shape))
        return seconds[0]

    monkeypatch.setattr(assembly, "seconds_of_a_pass", measured)
    short = parts_of()
    assert (short.settings.machine.compile, short.compilation.compile) == (False, False)
    assert [
        line for line in introduction(short, yardstick(short), tmp_path) if line.startswith("compile: no")
    ]
    seconds[0] = 1e4
    assert parts_of(grad_accum_steps=2).settings.machine.compile is True
    assert seen == 2 * [(4, 3, 32, 32)]


def test_what_is_asked_for_is_not_measured(monkeypatch):
    monkeypatch.setattr(assembly, "seconds_of_a_pass", None)
    assert parts_of(compile=False).settings.machine.compile is False


def test_without_a_compiler_nothing_is_measured_or_compiled(monkeypatch):
    monkeypatch.setattr(assembly, "can_compile", lambda: False)
    monkeypatch.setattr(assembly, "seconds_of_a_pass", None)
    parts = parts_of()
    assert parts.settings.machine.compile is False
    assert "C++ compiler" in parts.compilation.why


def test_measuring_leaves_weights_statistics_gradients_and_random_states_alone():
    model = small("vitc_nano", drop_path=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch, state = triple(4), torch.get_rng_state()
    assert seconds_of_a_pass(Objective(model, dtype=torch.float32), batch) > 0
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "cost", "shapes"),
    [
        ({}, 1.0, 1),
        ({"low_res": (48, 96), "low_res_until": 0.5}, 0.75, 2),
        ({"low_res": (48, 96), "low_res_until": 0.5, "patch_drop": 0.5, "patch_drop_until": 0.3}, 0.75, 3),
        ({"patch_drop": 0.5}, 1.0, 1),
    ],
)
def test_a_curriculum_counts_its_cost_and_its_shapes(changes, cost, shapes):
    curriculum = replace(Curriculum((96, 96)), **changes)
    assert (curriculum.cost(), curriculum.shapes()) == (pytest.approx(cost), shapes)


def test_an_equal_run_after_one_that_was_compiled_expects_to_compile_sooner(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    mark, other = mark_of("a model", 64), mark_of("a model", 32)
    first = where_it_pays(CPU, 300.0, 1, mark)
    assert not first.compile
    first.remember()
    assert not mark.exists()
    where_it_pays(CPU, 3600.0, 1, mark).remember()
    again = where_it_pays(CPU, 300.0, 1, mark)
    assert again.compile
    assert "as an equal run was compiled before" in again.why
    assert not where_it_pays(CPU, 300.0, 1, other).compile


def test_what_is_compiled_is_kept_in_the_cache_folder_where_it_can_be(cache, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert mark_of("a").parent == cache / "inductor"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (cache / "inductor").chmod(0o777)
    assert mark_of("a") is None
