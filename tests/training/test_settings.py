from math import inf, nan
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import yaml

from fastvitc.errors import UsageError
from fastvitc.programs.evaluate import EvaluateSettings
from fastvitc.programs.train import read_settings
from fastvitc.programs.tune import TuneSettings
from fastvitc.training.recipes import recipe_settings
from fastvitc.training.settings import DataSettings, Recipe, TrainSettings
from fastvitc.training.state import RunState
from fastvitc.tuning import machine

PAPER_50_EPOCHS = {  # AdamW, SGD: learning rate, weight decay
    "vitp_1gf": (2e-3, 0.20, 1.9, 1.3e-5),
    "vitp_4gf": (2e-3, 0.20, 1.9, 1.3e-5),
    "vitp_18gf": (1e-3, 0.24, 1.1, 1.2e-5),
    "vitc_1gf": (2.5e-3, 0.19, 1.9, 1.3e-5),
    "vitc_4gf": (1e-3, 0.24, 1.3, 2.2e-5),
    "vitc_18gf": (1e-3, 0.24, 1.1, 2.7e-5),
}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def settings_of(args):
    return read_settings(args)[0]


def flat(settings):
    """All settings by their flags."""
    return SimpleNamespace(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in settings.to_dict().items()}
    )


def flat_of(args):
    return flat(settings_of(args))


def rates(settings):
    return settings.optimisation.lr, settings.optimisation.weight_decay


@pytest.mark.parametrize("epochs", [100, 200, 400])
@pytest.mark.parametrize(
    ("model", "lr", "weight_decay"),
    [
        ("vitc_1gf", 1e-3, 0.24),
        ("vitp_18gf", 1e-3, 0.24),
        ("vitc_36gf", 6e-4, 0.28),
        ("vitp_36gf", 6e-4, 0.28),
    ],
)
def test_long_recipes_carry_the_papers_numbers(epochs, model, lr, weight_decay):
    s = flat_of(["--recipe", f"paper-{epochs}ep", "--model", model])
    assert (s.model, s.epochs, s.opt, s.lr, s.weight_decay) == (model, epochs, "adamw", lr, weight_decay)
    assert (s.batch_size, s.warmup_epochs, s.smoothing, s.mixup, s.cutmix) == (2048, 5, 0.1, 0.8, 1.0)
    assert (s.augment, s.crop_scale, s.crop_aspect, s.hflip) == (
        "autoaugment",
        (0.08, 1.0),
        (3 / 4, 4 / 3),
        0.5,
    )
    assert (s.crop_ratio, s.model_ema, s.model_ema_every, s.precise_bn) == (0.875, True, 32, 8192)


@pytest.mark.parametrize(
    ("flags", "precision"), [({"avx2"}, "fp32"), ({"avx2", "avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16")]
)
def test_the_default_precision_is_one_that_the_cpu_multiplies_in(flags, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "cpu_flags", lambda: flags)
    assert {flat_of([]).precision, EvaluateSettings("").precision, TuneSettings().precision} == {precision}
    assert flat_of(["--precision", "fp32"]).precision == "fp32"


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_without_a_compiler_or_headers_nothing_can_be_compiled_on_a_cpu(missing, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if missing == "compiler":
        monkeypatch.setenv("CXX", str(tmp_path / "none"))
    else:
        monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    assert not machine.can_compile()
    assert not TuneSettings().compile
    assert flat_of(["--recipe", "small", "--compile"]).compile


@pytest.mark.parametrize(
    ("flags", "compile"),
    [([], None), (["--compile"], True), (["--no-compile"], False)],
)
def test_compilation_is_asked_for_forbidden_or_left_to_the_run(flags, compile):
    assert flat_of(flags).compile is compile


@pytest.mark.parametrize("model", PAPER_50_EPOCHS)
def test_50_epoch_recipes_carry_the_appendixs_numbers(model):
    adamw = settings_of(["--recipe", "paper-50ep", "--model", model])
    sgd = settings_of(["--recipe", "paper-50ep-sgd", "--model", model])
    assert (flat(adamw).opt, flat(sgd).opt, flat(adamw).epochs, flat(sgd).epochs) == ("adamw", "sgd", 50, 50)
    assert (*rates(adamw), *rates(sgd)) == PAPER_50_EPOCHS[model]
    alike = {"recipe": None, "opt": "", "lr": 1, "weight_decay": 0}
    assert adamw.changed(**alike) == sgd.changed(**alike)


@pytest.mark.parametrize("recipe", ["paper-50ep", "paper-50ep-sgd"])
def test_50_epochs_of_a_model_that_the_appendix_leaves_out_are_refused(recipe):
    with pytest.raises(UsageError, match="not for vitc_36gf"):
        read_settings(["--recipe", recipe, "--model", "vitc_36gf"])


def test_the_papers_recipes_train_vitc_4gf_unless_told_otherwise():
    assert flat_of(["--recipe", "paper-100ep"]).model == "vitc_4gf"


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (8, 1), (1, 16), (4, 8)])
def test_processes_and_accumulation_share_the_papers_batch(processes, accumulate, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for flags in (["--grad-accum-steps", str(accumulate)], [f"--grad-accum-steps={accumulate}"]):
        s = flat_of(["--recipe", "paper-100ep", *flags])
        assert s.grad_accum_steps == accumulate
        assert s.batch_size * processes * accumulate == 2048


def test_the_batch_of_other_recipes_is_not_shared(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert flat_of(["--recipe", "small"]).batch_size == 64


def test_flags_override_the_recipe():
    flags = [
        "--recipe",
        "paper-100ep",
        "--lr",
        "0.5",
        "--batch-size",
        "7",
        "--no-model-ema",
        "--crop-scale",
        "0.2",
        "0.9",
    ]
    s = flat_of([*flags, "--augment", "none", "--epochs", "3"])
    assert (s.lr, s.batch_size, s.model_ema, s.crop_scale) == (0.5, 7, False, (0.2, 0.9))
    assert (s.augment, s.epochs, s.weight_decay) == ("none", 3, 0.24)


def test_short_flags_name_batch_size_workers_and_output():
    s = flat_of(["-b", "12", "-j", "3", "-o", "somewhere"])
    assert (s.batch_size, s.workers, s.output) == (12, 3, "somewhere")


def test_without_arguments_digits_are_trained_unmirrored():
    s = flat_of([])
    assert (s.recipe, s.model, s.data_dir, s.hflip) == ("digits", "vitc_nano", None, 0.0)


def test_a_data_folder_gets_the_small_recipe():
    s = flat_of(["--data-dir", "/images"])
    assert (s.recipe, s.model, s.augment, s.hflip) == ("small", "vitc_4gf", "randaugment", 0.5)


def test_a_recipe_goes_before_the_one_the_data_suggests():
    assert flat_of(["--data-dir", "/images", "--recipe", "digits"]).recipe == "digits"


def test_a_resumed_run_has_its_settings_unless_given_anew(tmp_path):
    settings = recipe_settings("small", "vitp_nano").changed(lr=0.125, output="first", image_size=(16, 32))
    ops = {"attention": "torch"}
    saved = RunState(
        2, 0, 50.0, [], {}, None, [], [{}], settings.to_dict(), ["a"], ops, "digest", [[0.0, 2]], [], 0
    )
    saved.save(saved.file_in(tmp_path))
    resumed, state = read_settings(["--resume", str(tmp_path), "--log-every", "7"])
    assert resumed == settings.changed(resume=str(tmp_path), output=None, log_every=7)
    assert state == saved


@pytest.mark.parametrize(
    "settings",
    [
        TrainSettings(),
        TrainSettings().changed(image_size=(32, 64), clip_grad=1.0, workers=0, output="a b", seed=3),
        recipe_settings("paper-400ep", "vitc_36gf", 16),
    ],
)
def test_settings_survive_yaml(settings):
    assert TrainSettings.from_dict(yaml.safe_load(yaml.safe_dump(settings.to_dict()))) == settings


def test_unknown_settings_are_named():
    with pytest.raises(UsageError, match="unknown settings: colour, taste"):
        TrainSettings.from_dict({"taste": 1, "lr": 0.1, "colour": 2})


@pytest.mark.parametrize(("given", "size"), [(None, None), ((48,), (48, 48)), ((32, 64), (32, 64))])
def test_an_image_size_is_one_side_or_height_and_width(given, size):
    assert DataSettings(image_size=given).size() == size


OUT_OF_RANGE = {
    "epochs": [0, -1],
    "batch_size": [0],
    "grad_accum_steps": [0],
    "log_every": [0],
    "model_ema_every": [0],
    "seed": [-1],
    "workers": [-1],
    "warmup_epochs": [-0.5, nan, inf],
    "precise_bn": [-1],
    "weight_decay": [-1e-9, nan, inf],
    "mixup": [-0.1, nan],
    "cutmix": [-0.1, nan],
    "smoothing": [-0.1, 1.1, nan],
    "hflip": [-0.1, 1.1],
    "drop_path": [-0.1, 1.1],
    "crop_ratio": [-0.1, 0, 1.1],
    "lr": [0, -1e-3, nan, inf],
    "clip_grad": [0, -1.0, nan],
    "model_ema_rate": [0, -0.1, 1.1],
    "peak_tflops": [0, -1],
    "crop_scale": [(0, 1), (0.5, 0.4), (0.5, 1.1), (nan, 1)],
    "crop_aspect": [(0, 1), (2, 1), (1, nan)],
    "image_size": [(1, 2, 3), ()],
    "low_res": [(1, 2, 3), (0,)],
    "low_res_until": [-0.1, 1.1],
    "patch_drop": [-0.1, 1],
    "opt_betas": [(0.9, 1), (-0.1, 0.9)],
    "momentum": [-0.1, 1],
    "decay_share": [0, 1.1],
    "cooldown_epochs": [-1, nan],
    "min_lr": [-1e-9, nan],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_value_out_of_range_is_refused_by_its_flag(name, value):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} "):
        TrainSettings().changed(**{name: value}).check()


@pytest.mark.parametrize(
    "recipe", ["digits", "small", "fast", "finetune", "paper-50ep", "paper-50ep-sgd", "paper-100ep"]
)
def test_every_recipe_passes_the_check(recipe):
    recipe_settings(recipe).check()


@pytest.mark.parametrize(
    "edge", [{"smoothing": 1}, {"workers": 0}, {"warmup_epochs": 0}, {"crop_ratio": 1}, {"model_ema_rate": 1}]
)
def test_values_at_the_end_of_their_range_pass(edge):
    TrainSettings().changed(**edge).check()


def test_the_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        read_settings(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for group in ("data", "model", "optimisation", "machine", "run"):
        assert f"{group} options" in text
    assert not [name for name in TrainSettings().to_dict() if f"--{name.replace('_', '-')}" not in text]


@pytest.mark.parametrize("flag", ["--data-dir", "--data_dir"])
def test_underscores_in_flags_mean_hyphens_for_the_recipe_too(flag):
    assert flat_of([f"{flag}=my_images"]).recipe == "small"
    assert flat_of([flag, "my_images"]).data_dir == "my_images"


def test_the_papers_recipes_keep_its_initialisation_and_all_others_draw_the_head():
    for recipe in get_args(Recipe):
        settings = recipe_settings(recipe, "vitc_4gf")
        assert settings.model.init == ("paper" if recipe.startswith("paper") else "drawn_head")
