import os
import shutil
import signal
from dataclasses import replace
from math import isfinite

import pytest
import torch

from fastvitc.data import synthetic_index
from fastvitc.errors import FastvitcError, Interrupted, UsageError
from fastvitc.models.saved import load_model, read_config
from fastvitc.models.vit import VisionTransformer
from fastvitc.training import folder as run_folder
from fastvitc.training.assembly import assemble
from fastvitc.training.folder import RunFolder
from fastvitc.training.interrupts import Interrupts
from fastvitc.training.optim import set_rates
from fastvitc.training.process import Process
from fastvitc.training.recipes import recipe_settings
from fastvitc.training.report import read_summary
from fastvitc.training.run import Run
from fastvitc.training.state import RunState, newest_state, state_files

HERE = Process(0, 1, torch.device("cpu"))


def parts_of(state=None, images=8, **changes):
    """A run on random images, `images` / 4 steps an epoch."""
    settings = recipe_settings("digits").changed(
        loader="synthetic",
        compile=False,
        opt="adamw",
        batch_size=4,
        peak_tflops=1.0,
        threads=None,
        epochs=2,
        precision="fp32",
    )
    indices = (synthetic_index(split, images, 3) for split in ("train", "val"))
    return assemble(settings.changed(**changes), HERE, *indices, state)


def run_in(folder, state=None, **changes):
    """Train in a folder, as the program does."""
    held = RunFolder(folder, keep=3)
    try:
        return Run(parts_of(state, **changes), state, held).train()
    finally:
        held.close()


def weights_of(folder):
    return load_model(folder / "last").state_dict()


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def spoil(monkeypatch):
    """Makes the update after each of some steps, counted from the run's begin, as large as can be."""

    def patch(steps):
        seed, rate = Run._seed, []

        def seeded(run, step):
            seed(run, step)
            rate[:] = [1e42 if step in steps else None]

        def rates(optimizers, share):
            set_rates(optimizers, rate[0] or share)

        monkeypatch.setattr(Run, "_seed", seeded)
        monkeypatch.setattr("fastvitc.training.run.set_rates", rates)

    return patch


def test_a_step_that_spoils_the_weights_is_left_out_and_its_images_are_written_down(tmp_path, spoil, capsys):
    options = {"images": 32, "save_every": 3}  # 8 steps an epoch
    spoil({12})
    run_in(tmp_path / "run", **options)
    assert "The run goes back to epoch 2, step 3, and leaves out 2 steps" in capsys.readouterr().out
    _, state = newest_state(tmp_path / "run")
    assert (state.skipped, state.rollbacks, state.epoch) == ([12, 13], 1, 2)
    listed = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    order = parts_of(**options).train_loader.order.epoch(1)
    images = [(step, n) for step in (5, 6) for n in order[step - 1].numbers]
    assert listed == [f"epoch 2 step {step}\tmade-up image {n}" for step, n in images]

    parts, held = parts_of(**options), RunFolder(tmp_path / "never", keep=2)
    without = Run(parts, None, held)
    without._skipped = {12, 13}
    without.train()
    held.close()
    assert_equal(weights_of(tmp_path / "run"), weights_of(tmp_path / "never"))


def test_a_run_whose_weights_are_spoilt_again_and_again_gives_up_and_keeps_what_was_good(tmp_path, spoil):
    run_in(tmp_path, images=32, epochs=1)
    good, (_, state) = weights_of(tmp_path), newest_state(tmp_path)
    spoil(range(9, 1000))
    with pytest.raises(FastvitcError, match="the run went back 2 times before"):
        run_in(tmp_path, state, images=32, epochs=2, max_rollbacks=2)
    assert_equal(weights_of(tmp_path), good)
    assert newest_state(tmp_path)[1].epoch == 1
    assert len((tmp_path / "skipped.txt").read_text().splitlines()) == 4 * (2 + 4)


def test_an_epoch_without_trouble_ends_the_count_of_rollbacks(tmp_path, spoil):
    spoil({2, 18})
    run_in(tmp_path, images=32, epochs=3, max_rollbacks=1)
    assert newest_state(tmp_path)[1].skipped == [2, 3, 18, 19]


def test_a_run_that_was_cut_goes_on_without_the_steps_that_it_left_out(tmp_path, spoil):
    options = {"images": 32, "save_every": 1}
    spoil({2})
    run_in(tmp_path / "whole", **options)
    held = RunFolder(tmp_path / "cut", keep=100)
    Run(parts_of(**options), None, held).train()
    held.close()
    later = next(state for file in state_files(tmp_path / "cut") if (state := RunState.load(file)).step == 6)
    assert later.skipped == [2, 3]
    run_in(tmp_path / "cut", later, **options)
    assert_equal(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


class Cut(Exception):
    """The end of a run that nothing announced."""


EVERYTHING = {
    "model_ema": True,
    "model_ema_rate": 0.3,
    "mixup": 0.5,
    "cutmix": 0.5,
    "grad_accum_steps": 2,
    "drop_path": 0.2,
    "precise_bn": 8,
    "opt": "muon",
    "sched": "wsd",
    "init": "drawn_head",
    "low_res": (16,),
    "patch_drop": 0.5,
    "patch_drop_until": 0.3,
    "mixup_prob": 0.7,
    "reprob": 0.5,
    "bce_loss": True,
    "in_chans": 1,
}


@pytest.mark.parametrize("extra", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cut", [1, 3, 4, 7])
def test_a_run_that_was_cut_after_any_step_goes_on_bit_for_bit(cut, precision, extra, tmp_path, monkeypatch):
    options = {"images": 32, "precision": precision, "save_every": 1, **extra}
    run_in(tmp_path / "whole", **options)
    answer, steps = Run._answer, []

    def cut_after(run, reporter):
        answer(run, reporter)
        steps.append(run.step)
        if len(steps) == cut:
            run.folder.finish()
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_answer", cut_after)
        with pytest.raises(Cut):
            run_in(tmp_path / "cut", **options)
    _, state = newest_state(tmp_path / "cut")
    run_in(tmp_path / "cut", state, **options)
    assert_equal(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))
    whole, again = (newest_state(tmp_path / name)[1] for name in ("whole", "cut"))
    assert_equal(again.model, whole.model)
    assert_equal([o["state"] for o in again.optimizers], [o["state"] for o in whole.optimizers])
    times = ("seconds", "images_per_second", "data_wait", "mfu")
    rows = [[{k: v for k, v in row.items() if k not in times} for row in s.rows] for s in (whole, again)]
    assert rows[0] == rows[1]
    assert [row.epoch for row in read_summary(tmp_path / "cut" / "summary.csv")] == [1, 2]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_signal_is_answered_by_a_saved_state_and_its_exit_code(number, code, where, tmp_path, monkeypatch):
    run_in(tmp_path / "whole")
    with monkeypatch.context() as patch:
        if where == "training":
            seed = Run._seed
            patch.setattr(
                Run, "_seed", lambda run, step: (seed(run, step), step == 1 and os.kill(os.getpid(), number))
            )
        else:
            batches = Run._watched

            def kill(run, loader):
                os.kill(os.getpid(), number)
                return batches(run, loader)

            patch.setattr(Run, "_watched", kill)
        with pytest.raises(
            Interrupted, match=f"stopped by {number.name}; epoch 1, step 2 is saved"
        ) as stopped:
            run_in(tmp_path / "cut")
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is not None
    _, state = newest_state(tmp_path / "cut")
    assert (state.epoch, state.step) == (0, 2)
    run_in(tmp_path / "cut", state)
    assert_equal(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


def test_a_second_interrupt_ends_at_once():
    with Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_states_are_saved_every_so_many_steps_and_only_the_newest_kept(tmp_path):
    run_in(tmp_path, images=32, epochs=1, save_every=2)  # 8 steps
    assert [path.stem for path in state_files(tmp_path)] == [
        "epoch-00001-step-00000000",
        "epoch-00000-step-00000008",
        "epoch-00000-step-00000006",
    ]


def test_states_are_saved_after_some_minutes(tmp_path, monkeypatch):
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr("fastvitc.training.run.time.monotonic", lambda: next(now))
    run_in(tmp_path, images=16, epochs=1, save_minutes=3.0)
    assert len(state_files(tmp_path)) == 3


@pytest.mark.parametrize("change", [{"images": 36}, {"image_size": (40,)}])
def test_other_images_are_refused_unless_told_to_go_on_from_the_epochs_start(change, tmp_path, capsys):
    run_in(tmp_path, images=32, epochs=1, save_every=3)
    state_files(tmp_path)[0].unlink()
    _, state = newest_state(tmp_path)
    assert state.step > 0
    options = {"images": 32, "epochs": 1} | change
    with pytest.raises(UsageError, match="add --resume-anyway to go on from the start of its epoch"):
        run_in(tmp_path, state, **options)
    if "images" in change:
        run_in(tmp_path, state, resume_anyway=True, **options)
        assert "resumed in epoch 1, at its start" in capsys.readouterr().out


def test_the_log_says_once_how_long_an_epoch_takes_before_the_second_one_starts(tmp_path, capsys):
    for name, log_every in (("a", 2), ("b", 50)):
        run_in(tmp_path / name, images=32, epochs=3, log_every=log_every)
        log = capsys.readouterr().out
        assert log.count("an epoch takes about") == 1
        assert "on this machine, 3 epochs" in log
        assert log.index("an epoch takes about") < log.index("epoch 2/3:")


@pytest.mark.slow
def test_a_run_that_went_on_from_an_older_state_keeps_its_own(tmp_path):
    run_in(tmp_path, images=32, epochs=1, save_every=2)
    older = state_files(tmp_path)[-1]
    run_in(tmp_path, RunState.load(older), images=32, epochs=2, save_every=2)
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "other" / "checkpoints")
    state = RunState.load(state_files(tmp_path)[-1])
    held = RunFolder(tmp_path / "other", keep=2)
    back = replace(state, epoch=0, step=1)
    held.save_state(back)
    held.close()
    assert state_files(tmp_path / "other") == [back.file_in(tmp_path / "other")]


def test_images_are_small_until_their_share_of_the_run_and_evaluated_at_full_size(tmp_path, monkeypatch):
    seen, forward = [], VisionTransformer.forward

    def noted(model, image, mix=None):
        seen.append((model.training, image.shape[2:], model.patch_drop))
        return forward(model, image, mix)

    monkeypatch.setattr(VisionTransformer, "forward", noted)
    run_in(tmp_path, low_res=(16, 24), low_res_until=0.5, patch_drop=0.25, patch_drop_until=0.6, epochs=3)
    small, large = (True, (16, 24), 0.25), (True, (32, 32), 0.0)
    full = (True, (32, 32), 0.25)
    assert [pass_ for pass_ in seen if pass_[0]] == 4 * [small] + 2 * [large]
    assert full not in seen
    assert {size for training, size, _ in seen if not training} == {(32, 32)}


def test_a_low_resolution_that_is_no_multiple_of_the_stride_is_refused():
    with pytest.raises(UsageError, match="multiples of the stem's stride 8"):
        parts_of(low_res=(20,))


def test_validations_come_at_their_interval_and_at_the_end(tmp_path, capsys):
    run_in(tmp_path, epochs=5, val_interval=2)
    rows = read_summary(tmp_path / "summary.csv")
    assert [isfinite(row.val_top1) for row in rows] == [False, True, False, True, True]
    assert [isfinite(row.train_loss) for row in rows] == [True] * 5
    assert capsys.readouterr().out.count("validation loss") == 3
    assert (tmp_path / "curves.png").exists()


def test_nothing_is_mixed_after_the_epoch_where_mixing_ends(monkeypatch):
    run = Run(parts_of(mixup=1.0, mixup_off_epoch=1), None, None)
    assert run._mix(0)[0] < 1
    run.epoch = 1
    assert run._mix(4).tolist() == [1, 0, 32, 0, 32]


def test_means_and_deviations_go_with_the_saved_model(tmp_path):
    run_in(tmp_path, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    model = load_model(tmp_path / "last")
    assert model.stem.pixel_shift.tolist() == pytest.approx([-0.1, -0.1, -0.1])
    assert read_config(tmp_path / "last")["preprocessing"]["std"] == [1.0, 2.0, 3.0]


def test_means_that_are_not_one_for_each_channel_are_refused():
    with pytest.raises(UsageError, match="a number for each of the 1 channels"):
        parts_of(in_chans=1, mean=(0.1, 0.2, 0.3))


def test_the_writing_thread_gets_weights_in_order_and_starts_no_threads_of_its_own(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        run_folder, "save_weights", lambda path, config, weights, **notes: written.append(weights)
    )
    run_in(tmp_path, epochs=1)
    assert len(written) == 2
    assert all(value.is_contiguous() for weights in written for value in weights.values())
    model = parts_of().model
    assert not all(value.is_contiguous() for value in model.state_dict().values())
