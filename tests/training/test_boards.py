import json
import math
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastvitc.errors import FastvitcError, UsageError
from fastvitc.training.boards import JsonLines, TensorBoard, WeightsAndBiases, check_wandb, open_boards


def objects(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_has_an_object_for_each_figure_and_line(tmp_path):
    log = JsonLines(tmp_path)
    log.text("a line")
    log.figures("epoch", 30, {"loss": 1.5, "other": math.nan})
    log.close()
    line, epoch = objects(tmp_path)
    assert (line["kind"], line["text"]) == ("text", "a line")
    assert {k: v for k, v in epoch.items() if k != "time"} == {
        "kind": "epoch",
        "step": 30,
        "loss": 1.5,
        "other": None,
    }
    assert line["time"] <= epoch["time"]


def test_a_resumed_run_adds_to_the_log_below_a_line_that_a_kill_cut(tmp_path):
    for text in ("one", "two"):
        log = JsonLines(tmp_path)
        log.text(text)
        log.close()
    assert [entry["text"] for entry in objects(tmp_path)] == ["one", "two"]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"time": 3')
    log = JsonLines(tmp_path)
    log.text("three")
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert (lines[2], json.loads(lines[3])["text"]) == ('{"time": 3', "three")


def test_tensorboard_drops_what_was_told_after_the_state_that_a_run_goes_on_from(tmp_path):
    for steps, told in ((0, (1, 2, 3)), (2, (3, 4))):
        board = TensorBoard(tmp_path, steps)
        for step in told:
            board.figures("step", step, {"loss": 10.0 * steps + step})
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("step/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


def test_without_a_project_there_is_no_third_board(tmp_path):
    boards = open_boards(tmp_path, 0, None, {})
    assert [type(board) for board in boards] == [TensorBoard, JsonLines]
    for board in boards:
        board.close()


class Wandb:
    """Takes the place of the package: what it was told."""

    def __init__(self, error=None):
        self.error, self.begun, self.logged, self.ended = error, [], [], 0

    def init(self, **options):
        if self.error:
            raise self.error
        self.begun.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.ended += 1


def test_a_resumed_run_goes_on_in_its_run_of_weights_and_biases(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (5, 5):
        board = WeightsAndBiases(tmp_path, "digits", {"lr": 0.1})
        board.figures("step", step, {"loss": 2.0})
        board.close()
    first, second = wandb.begun
    assert first == second
    assert (first["project"], first["config"], first["resume"]) == ("digits", {"lr": 0.1}, "allow")
    assert wandb.logged == [{"step": 5, "step/loss": 2.0}] * 2
    assert wandb.ended == 2


def test_what_weights_and_biases_raises_is_one_line_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(RuntimeError("no API key\nTraceback ...")))
    with pytest.raises(FastvitcError, match=r"no API key.*WANDB_MODE=offline") as error:
        WeightsAndBiases(tmp_path, "digits", {})
    assert "\n" not in str(error.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    check_wandb(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fastvitc\[wandb\]'"):
        check_wandb("digits")
