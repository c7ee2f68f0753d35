import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_contests import CPU, ROOT, Measurer

from bench.gpu import __main__ as runner
from bench.gpu.measure import OUT_OF_TIME
from bench.gpu.plan import plan


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with a measurer; gives its exit code and what it has written."""

    def go(measurer, *args):
        machine = {"device": "abacus", "nvidia_smi": None, "versions": {}, "copy_peak": 1e9}
        machine |= {"flops_peak": 1e12, "flops_peak_source": "made up"}
        tests = {"state": "measured", "reason": "", "passed": 1, "failed": 0, "skipped": 0, "failures": []}
        monkeypatch.setattr(runner, "_machine", lambda device: machine)
        monkeypatch.setattr(runner, "run_kernel_tests", lambda seconds, dry_run: tests)
        monkeypatch.setattr(runner, "Worker", lambda dry_run: measurer)
        with pytest.raises(SystemExit) as ended:
            runner.main(["--dry-run", "--out", str(tmp_path), *args])
        return ended.value.code, json.loads((tmp_path / "results.json").read_text())

    return go


def test_entries_past_the_deadline_are_not_measured(run, monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])

    def pass_time(count):
        now[0] += 20.0

    code, results = run(Measurer(pass_time), "--minutes", "1")
    assert code == 0
    count = len(plan(dry_run=True))
    assert [e["state"] for e in results["entries"]] == ["measured"] * 3 + ["not measured"] * (count - 3)
    assert {e.get("reason") for e in results["entries"][3:]} == {OUT_OF_TIME}
    assert (tmp_path / "table.txt").read_text().count("not measured: out of time") == count - 3


def test_results_are_saved_after_every_entry(run, tmp_path):
    saved = []
    run(Measurer(lambda count: saved.append(json.loads((tmp_path / "results.json").read_text()))))
    for count, results in enumerate(saved):
        reached = [e for e in results["entries"] if e.get("reason") != "not reached"]
        assert len(reached) == count
        assert results["label"] == "Dry run: nothing measured"


def test_the_results_of_a_killed_run_are_whole(tmp_path):
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from bench.gpu import __main__ as runner
from gpu_contests import Measurer
runner.run_kernel_tests = lambda seconds, dry_run: dict(state="not measured", reason="")
runner.Worker = lambda dry_run: Measurer(lambda count: count == 3 and os.kill(os.getpid(), signal.SIGKILL))
runner.main(["--dry-run", "--out", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [e["state"] for e in results["entries"]][:3] == ["measured", "measured", "not measured"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_error_and_no_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        runner.main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "PyTorch finds no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.slow
def test_a_dry_run_brings_every_entry_into_a_known_state(tmp_path):
    env = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [e["title"] for e in results["entries"]] == [e.title for e in plan(dry_run=True)]
    for entry in results["entries"]:
        assert entry["state"] == "measured", entry
        found = {record["state"] for name, record in entry["contenders"].items() if "fastvitc " not in name}
        assert found == {"measured"}, entry
    assert results["kernel_tests"]["passed"] > 0
    text = (tmp_path / "table.txt").read_text()
    assert text.startswith("# Dry run: nothing measured\n")
    assert text in done.stdout


def test_the_plan_begins_with_both_directions_of_the_small_models():
    entries = plan(dry_run=False)
    assert len({e.title for e in entries}) == len(entries) == 4 * (2 * 3 + 2)
    assert [e.title for e in entries[:7]] == [
        *(
            f"{op}, {m}, forward + backward"
            for m in ("vitc_1gf", "vitc_4gf")
            for op in ("stem", "attention", "bn_relu")
        ),
        "training step, vitc_1gf",
    ]
    assert {e.model for e in entries[16:]} == {"vitc_18gf", "vitc_36gf"}


def test_every_entry_finds_its_contest():
    for entry in plan(dry_run=True):
        made = entry.contest(2, CPU, torch.bfloat16)
        assert made.name.startswith(entry.title.split(", ")[0])
        assert ("forward + backward" in made.name) == ("forward + backward" in entry.title)
