import csv
import json
import sys

import pytest
from PIL import Image

from bench.race import peer
from bench.race.__main__ import OURS, main
from bench.race.curves import Point, accuracy_at, draw, results, table, time_to, write_csv
from fastvitc.errors import FastvitcError

SLOW = [Point(10, 20.0), Point(20, 30.0), Point(30, 40.0)]
FAST = [Point(5, 25.0), Point(10, 41.0), Point(15, 39.0)]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_time_is_that_of_the_first_epoch_with_the_accuracy():
    assert time_to(FAST, 40.0) == 10
    assert time_to(FAST, 39.0) == 10
    assert time_to(SLOW, 40.5) is None


def test_the_accuracy_at_a_time_is_that_of_the_last_epoch_that_has_ended():
    assert accuracy_at(FAST, 4.9) == 0.0
    assert accuracy_at(FAST, 14.9) == 41.0
    assert accuracy_at(FAST, 100) == 39.0


def test_a_racer_is_measured_by_the_peers_accuracy_and_time():
    found = results({"peer": [SLOW] * 3, "ours": [FAST] * 3}, "peer")
    assert (found["peer"].to_target, found["peer"].share) == (30, 1.0)
    ours = found["ours"]
    assert (ours.to_target, ours.share, ours.at_equal_time) == (10, pytest.approx(1 / 3), 39.0)
    assert "| ours | 39.00% | 15 s | 10 s | 0.33 | 39.00% |" in table(found, "peer", 3)


def test_a_seed_that_never_gets_there_is_slower_than_all_others():
    never = [Point(5, 1.0)]
    curves = {"peer": [SLOW] * 3, "ours": [never, FAST, [Point(7, 50.0)]], "late": [never, never, FAST]}
    found = results(curves, "peer")
    assert found["ours"].to_target == 10
    assert found["late"].to_target is None
    assert "| late | 1.00% | 5 s | not reached |" in table(found, "peer", 3)


def test_curves_are_written_as_rows_and_as_a_picture(tmp_path):
    curves = {"peer": [SLOW, SLOW], "ours": [FAST, FAST]}
    write_csv(curves, tmp_path / "curves.csv")
    rows = rows_of(tmp_path / "curves.csv")
    assert len(rows) == 12
    assert rows[4] == {"racer": "peer", "seed": "1", "epoch": "2", "seconds": "20.00", "top1": "30.000"}
    draw(curves, "peer", "a title", tmp_path / "race.png")
    with Image.open(tmp_path / "race.png") as image:
        assert image.format == "PNG"


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning"
)  # timm leaves them to the garbage collector
def test_the_peer_learns_and_tells_each_epoch(few_digits, capsys, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda model: model)
    options = [
        "--data-dir",
        few_digits,
        "--model",
        "vitc_nano",
        "--image-size",
        32,
        "--epochs",
        6,
        "--hflip",
        0,
    ]
    options += ["--batch-size", 10, "--workers", 0, "--mixup", 0.1, "--warmup-epochs", 1, "--scale", 0.8, 1]
    peer.train(peer.arguments([*map(str, options)]))
    epochs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["val_top1"] > 50
    assert epochs[-1]["time"] > epochs[0]["time"]


@pytest.fixture
def instead(monkeypatch):
    """Makes both racers the given Python code; `sys.argv` is the rest of their command."""

    def use(code):
        def command(args, epochs, folder, seed):
            return [sys.executable, "-c", code, str(epochs)]

        monkeypatch.setattr("bench.race.__main__.command_of", command)

    return use


def race(folder):
    main(["--data", "images", "--out", str(folder), "--seeds", "2", "--ours-epochs", "1", "2"])


def test_a_racer_that_fails_is_told_with_its_log_and_the_rest_is_kept(instead, tmp_path, capsys):
    tell = "import json, time; print(json.dumps({'time': time.time(), 'val_top1': 40.0}))"
    instead(f"import sys; {tell}; sys.exit(3 * (sys.argv[1] != 'None'))")
    with pytest.raises(FastvitcError, match=f"{OURS}, 1 epochs ended with 3; .*log.txt says why"):
        race(tmp_path)
    assert "timm, seed 0: 40.00%" in capsys.readouterr().out
    (folder,) = tmp_path.glob("*/curve.json")
    assert folder.parent.name == "timm-0"


def test_a_race_that_is_started_again_makes_no_run_twice(instead, tmp_path, capsys):
    for name in ("timm", "fastvitc-train-1-epochs", "fastvitc-train-2-epochs"):
        for seed in (0, 1):
            (tmp_path / f"{name}-{seed}").mkdir()
            (tmp_path / f"{name}-{seed}" / "curve.json").write_text("[[1.0, 30.0], [2.0, 50.0]]")
    instead("raise SystemExit(1)")
    race(tmp_path)
    assert "| fastvitc-train, 2 epochs | 50.00% | 2 s | 2 s | 1.00 | 50.00% |" in capsys.readouterr().out
    assert (tmp_path / "race.md").read_text().count("| timm |") == 1


@pytest.mark.full
def test_both_racers_run_from_a_cold_start(few_digits, tmp_path, capsys):
    options = ["--model", "vitc_nano", "--image-size", "32", "--epochs", "4", "--seeds", "1", "--hflip", "0"]
    options += ["--recipe", "small", "--ours-epochs", "4", "--timm=--batch-size 10 --warmup-epochs 1"]
    ours = ["--batch-size", "10", "--no-compile"]
    main(["--data", str(few_digits), "--out", str(tmp_path), *options, "--", *ours])
    assert "| fastvitc-train, 4 epochs |" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "curves.csv")) == 8
