"""`fastvitc-tune`, and training that measures by itself."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import torch

from fastvitc.errors import FastvitcError, UsageError
from fastvitc.kernels import Measured, chosen, measured, record
from fastvitc.kernels.attention import _BACKENDS, library
from fastvitc.kernels.conv_stem import _BACKENDS as conv_stem_backends
from fastvitc.kernels.cpu import build
from fastvitc.models.config import StemConfig, ViTConfig
from fastvitc.programs import train as train_program
from fastvitc.programs import tune as program
from fastvitc.training.process import Process
from fastvitc.training.settings import TrainSettings
from fastvitc.tuning import measure, tune
from fastvitc.tuning.measure import Result, Setting, compare

CPU = torch.device("cpu")
STEM = StemConfig((8, 16, 32), (3, 3, 1), (2, 2, 1))
CONFIG = ViTConfig(STEM, 32, 64, heads=2, depth=1, image_size=(16, 16), num_classes=4)
SMALL = Setting("small", CONFIG, 4, torch.float32, CPU, compile=False)


@pytest.fixture
def two(monkeypatch):
    """Two candidates of attention and one of the stem: without Triton's interpreter, which is slow."""
    for backends in (_BACKENDS, conv_stem_backends):
        for name in backends.unavailable.keys() & {"triton", "bn_relu"}:
            monkeypatch.setitem(backends.unavailable, name, lambda device_type: "not in this test")
    monkeypatch.setattr(build, "_obstacle", lambda: "not in this test")
    one = {op: ["torch"] for op in ("add_layer_norm", "bias_gelu", "conv_stem")}
    assert tune.candidates(CPU) == {"attention": ["torch", "flash"], "bn_relu": ANY, **one}


@pytest.fixture
def wrong(two, monkeypatch):
    """Makes the backend flash compute something else."""

    def install(change):
        original = library.attention

        def changed(qkv, num_heads, scale, backend):
            out = original(qkv, num_heads, scale, backend)
            return change(out) if backend == "flash" else out

        monkeypatch.setattr(library, "attention", changed)

    return install


def results_of(monkeypatch, times):
    """Replaces the clock by given milliseconds."""

    def fixed(calls, device, rounds):
        return {name: times[name] / 1e3 for name in calls}

    monkeypatch.setattr(measure, "_time", fixed)


@pytest.mark.parametrize(("pool", "dtype"), [("token", torch.float32), ("mean", torch.bfloat16)])
@pytest.mark.parametrize("op", ["attention", "conv_stem"])
def test_every_candidate_gives_the_references_tensors_and_a_time(op, pool, dtype):
    setting = replace(SMALL, batch_size=2, dtype=dtype, config=replace(CONFIG, pool=pool))
    names = tune.candidates(CPU)[op]
    results = compare(setting, op, names, rounds=1)
    assert [r.backend for r in results] == names
    for r in results:
        assert r.reason is None
        assert r.milliseconds > 0
        assert 0 <= r.error < (1e-4 if dtype == torch.float32 else 0.3)


def test_the_calls_return_the_output_and_every_gradient():
    for op, tensors in (("attention", 2), ("conv_stem", 1 + 2 + 2 * 3 + 2)):
        found = measure.CALLS[op](SMALL, "torch")()
        assert len(found) == tensors
        assert found[0].shape == (4, 17, 32)
        assert all(t.abs().sum() > 0 for t in found[:2])


def test_compiled_candidates_are_measured_as_one_graph_each(two):
    results = compare(replace(SMALL, compile=True), "attention", tune.candidates(CPU)["attention"], rounds=1)
    assert [(r.backend, r.reason) for r in results] == [("torch", None), ("flash", None)]


def oom(out):
    raise torch.OutOfMemoryError("out of memory: tried to allocate\nmany gigabytes")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: 1.05 * out, "the output is off by 5.0e-02 of the reference's norm, allowed are 1.0e-02"),
        (lambda out: out + 0.05 * (out - out.detach()), "gradient 1 is off by 5.0e-02"),
        (lambda out: out * float("nan"), "the output is off by inf"),
        (lambda out: out[:, :-1], "RuntimeError"),
        (oom, "OutOfMemoryError: out of memory: tried to allocate many gigabytes"),
    ],
)
def test_a_candidate_that_is_off_or_raises_is_told_and_cannot_win(wrong, change, words, monkeypatch):
    wrong(change)
    results_of(monkeypatch, {"torch": 2.0, "flash": 1.0})
    found = tune.tune(SMALL)
    torch_, flash = found["attention"]
    assert flash.milliseconds is None
    assert words in flash.reason
    assert torch_.milliseconds == 2.0
    assert flash.reason in tune.table(found)
    known = measured(CPU, torch.float32)["attention"]
    assert (known.backend, known.milliseconds) == ("torch", {"torch": 2.0, "flash": None})


def test_a_backend_may_err_twice_as_much_as_pytorchs_ops():
    assert measure._objection([0.03, 0.009], [0.016, 0.0]) is None
    assert "gradient 1" in measure._objection([0.03, 0.011], [0.016, 0.0])
    assert "allowed are 3.2e-02" in measure._objection([0.033, 0.0], [0.016, 0.0])


def test_a_reference_that_cannot_run_asks_for_a_smaller_batch(monkeypatch):
    monkeypatch.setitem(measure.CALLS, "attention", lambda setting, backend: lambda: oom(None))
    with pytest.raises(FastvitcError, match=r"failed at batch 4: .* take a smaller --batch-size"):
        compare(SMALL, "attention", ["torch"], 1)


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"torch": 1.00, "flash": 0.97}, "flash"),
        ({"torch": 1.00, "flash": 0.99}, "torch"),
        ({"torch": 1.019, "flash": 1.00}, "torch"),
        ({"torch": 1.021, "flash": 1.00}, "flash"),
        ({"torch": 0.5, "flash": 1.00}, "torch"),
        ({"torch": None, "flash": 1.00}, "flash"),
        ({"torch": None, "flash": None}, None),
        ({"torch": 2.0, "flash": 1.01, "cudnn": 1.0}, "flash"),
    ],
)
def test_within_two_percent_the_earlier_backend_of_the_order_wins(times, winner):
    assert tune.fastest([Result(name, ms) for name, ms in times.items()]) == winner


def test_the_fastest_is_recorded_with_every_time_and_what_was_measured(two, monkeypatch):
    results_of(monkeypatch, {"torch": 2.0, "flash": 1.0})
    tune.tune(SMALL)
    subject = {
        "model": "small", "batch_size": 4, "dtype": "float32", "image_size": [16, 16], "compile": False,
    }  # fmt: skip
    assert measured(CPU, torch.float32) == {
        "attention": Measured("flash", {"torch": 2.0, "flash": 1.0}, subject),
        "conv_stem": Measured("torch", {"torch": None}, subject),
    }
    assert chosen(dtype=torch.float32)["attention"] == "flash"


def test_an_op_with_one_candidate_is_not_measured(two, monkeypatch):
    asked = []
    monkeypatch.setattr(
        tune, "compare", lambda s, op, names, rounds: asked.append(op) or [Result(n, 1.0) for n in names]
    )
    monkeypatch.setattr(tune, "candidates", lambda device: {"attention": ["torch"], "conv_stem": ["a", "b"]})
    found = tune.tune(SMALL)
    assert asked == ["conv_stem"]
    assert found["attention"] == [Result("torch", reason="the only one; not measured")]


def test_where_no_backend_can_be_measured_nothing_is_recorded(two, monkeypatch):
    monkeypatch.setattr(
        tune, "compare", lambda s, op, names, rounds: [Result(n, reason="broken") for n in names]
    )
    with pytest.raises(FastvitcError, match="no backend could be measured: torch: broken; flash: broken"):
        tune.tune(SMALL)
    assert measured(CPU) == {}


def test_passes_alternate_and_the_median_counts(monkeypatch):
    order, ticks = [], iter(range(1, 1000))
    monkeypatch.setattr(measure, "seconds", lambda call, device, repeats: call() or next(ticks))
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure._time(calls, CPU, 3)
    assert order == ["a", "a", "b", "b", "a", "b", "a", "b", "a", "b"]
    assert times == {"a": 7, "b": 8}


def test_measuring_moves_no_random_stream(two):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    compare(SMALL, "attention", ["torch"], 1)
    compare(SMALL, "conv_stem", ["torch"], 1)
    assert torch.equal(torch.rand(1), expected)


def test_the_program_prints_a_table_and_changes_what_auto_takes(two, monkeypatch, capsys):
    args = ["--model", "vitc_nano", "--image-size", "16", "24", "-b", "2", "--rounds", "1", "--no-compile"]
    args += ["--device", "cpu", "--precision", "bf16"]
    monkeypatch.setattr(sys, "argv", ["fastvitc-tune", *args])
    results_of(monkeypatch, {"torch": 2.0, "flash": 1.0})
    program.cli()
    said = capsys.readouterr().out
    assert "vitc_nano at 16x24, batch 2, bf16" in said
    assert "attention  torch           2.000   2.00" in said
    assert "auto takes: attention flash, conv_stem torch" in said
    assert chosen(dtype=torch.bfloat16)["attention"] == "flash"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "vitc_nan"], "did you mean vitc_nano"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--image-size", "1", "2", "3"], "one or two numbers"),
        (["--image-size", "30"], "multiples of the stem's stride"),
    ],
)
def test_a_command_line_that_cannot_be_ends_in_one_message_and_code_2(args, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastvitc-tune", "--device", "cpu", *args])
    with pytest.raises(SystemExit) as ended:
        program.cli()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def settle(settings=None, **changes):
    settings = settings or TrainSettings().changed(
        model="vitc_nano", precision="fp32", batch_size=4, compile=False
    )
    settings = settings.changed(**changes)
    resumed = settings.run.resume is not None
    return train_program.with_backends(settings, Process(0, 1, CPU), resumed).model.backend


@pytest.fixture
def tuned(two, monkeypatch):
    """Training that thinks it is on a GPU; the settings that were measured."""
    asked = []
    original = tune.tune

    def spy(setting):
        asked.append(setting)
        return original(setting, rounds=1)

    monkeypatch.setattr(train_program, "tune", spy)
    monkeypatch.setattr(train_program, "measures_at_start", lambda device: True)
    results_of(monkeypatch, {"torch": 2.0, "flash": 1.0})
    return asked


def test_training_measures_on_gpus_only():
    assert [tune.measures_at_start(torch.device(kind)) for kind in ("cuda", "cpu")] == [True, False]


def test_training_on_a_cpu_takes_the_order_unless_tuned(two, monkeypatch):
    monkeypatch.setattr(train_program, "tune", None)
    assert settle() == "add_layer_norm=torch,attention=torch,bias_gelu=torch,bn_relu=torch,conv_stem=torch"
    record(CPU, torch.float32, {"attention": Measured("flash", {"torch": 2.0, "flash": 1.0}, {})})
    assert settle() == "add_layer_norm=torch,attention=flash,bias_gelu=torch,bn_relu=torch,conv_stem=torch"


def test_training_on_a_gpu_measures_its_own_shapes_once(tuned, capsys):
    for _ in range(2):
        assert (
            settle(image_size=(16,), pool="mean")
            == "add_layer_norm=torch,attention=flash,bias_gelu=torch,bn_relu=torch,conv_stem=torch"
        )
    (setting,) = tuned
    assert (setting.model, setting.batch_size, setting.dtype) == ("vitc_nano", 4, torch.float32)
    assert (setting.config.image_size, setting.config.pool, setting.compile) == ((16, 16), "mean", False)
    assert capsys.readouterr().out.count("measuring the backends of the ops on") == 1


@pytest.mark.parametrize("backend", ["torch", "attention=torch", "attention=flash,conv_stem=torch"])
def test_named_backends_are_not_measured(backend, tuned):
    named = settle(backend=backend)
    assert not tuned
    assert f"attention={'flash' if 'flash' in backend else 'torch'}" in named.split(",")


def test_a_new_candidate_is_measured_and_an_old_measurement_of_another_dtype_does_not_count(tuned):
    record(CPU, torch.float32, {"attention": Measured("torch", {"torch": 1.0}, {})})
    assert "attention=flash" in settle().split(",")
    assert len(tuned) == 1
    settle(precision="bf16")
    assert len(tuned) == 2


def test_a_measurement_that_fails_does_not_stop_training(tuned, monkeypatch, capsys):
    def fail(setting):
        raise FastvitcError("no memory; take a smaller --batch-size")

    monkeypatch.setattr(train_program, "tune", fail)
    assert "attention=torch" in settle().split(",")
    assert "not measured: no memory" in capsys.readouterr().out


def test_other_processes_take_what_the_main_one_chose(tuned):
    main = {"attention": "flash", "bn_relu": "torch", "conv_stem": "torch"}
    other = SimpleNamespace(device=CPU, agree=lambda step: None, share=lambda value: value or main)
    settings = TrainSettings().changed(precision="fp32")
    assert "attention=flash" in train_program.with_backends(settings, other).model.backend.split(",")
    assert not tuned


def test_a_resumed_run_whose_backend_is_not_here_is_told_what_to_pass():
    stored = "attention=cudnn,bn_relu=torch,conv_stem=torch"
    with pytest.raises(UsageError, match=r"'cudnn' is not available on cpu: .* pass --backend auto"):
        settle(resume="run", backend=stored)
    assert "attention=native" in settle(resume="run", backend="auto").split(",")
