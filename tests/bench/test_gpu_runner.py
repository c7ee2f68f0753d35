import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.contest import Candidate, Contest
from bench.gpu import __main__ as runner
from bench.gpu import kernel_tests, worker
from bench.gpu.measure import OUT_OF_TIME, Patience, measure
from bench.gpu.plan import CONTENDERS, Entry, plan
from bench.gpu.stopwatch import WallStopwatch
from bench.gpu.table import Row, rows, table

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


def measured(contenders, names=None, seconds=60.0, **options):
    end = time.monotonic() + seconds
    return measure(contest(contenders), names or list(contenders), WallStopwatch(), PATIENCE, end, **options)


def states(records):
    return {name: record["state"] for name, record in records.items()}


def test_contenders_alternate_after_all_are_checked():
    calls = []
    found = measured({n: candidate(lambda n=n: calls.append(n)) for n in "ab"})
    assert states(found) == {"a": "measured", "b": "measured"}
    assert all(
        len(record["times"]) == PATIENCE.passes and record["parity_error"] == 0 for record in found.values()
    )
    assert "".join(calls).endswith("ababab")
    assert "".join(calls).rstrip("ab") == ""
    assert calls.index("b") == calls[: calls.index("b")].count("a")


def test_a_wrong_contender_is_not_timed():
    def never():
        raise AssertionError("it was called")

    found = measured({"wrong": candidate(never, -TRUTH), "right": candidate()})
    assert states(found) == {"wrong": "wrong", "right": "measured"}
    assert "is off by 2.00e+00 of the norm" in found["wrong"]["reason"]
    assert "times" not in found["wrong"]


def test_what_raises_when_built_or_called_is_recorded_and_the_others_are_measured():
    calls = []

    def later():
        calls.append(1)
        if len(calls) > 6:  # the calls before the first pass
            raise ValueError("late")

    found = measured(
        {"unbuilt": failing(), "late": candidate(later), "fine": candidate()}, ["unbuilt", "late", "fine"]
    )
    assert states(found) == {"unbuilt": "raised", "late": "raised", "fine": "measured"}
    assert found["unbuilt"]["reason"] == "RuntimeError: no such instruction"
    assert found["late"]["reason"] == "ValueError: late"


def test_a_contender_that_does_not_run_here_is_named():
    found = measured({"fine": candidate()}, ["missing", "fine"])
    assert found["missing"] == {"state": "not measured", "reason": "does not run here"}


def test_contenders_past_the_deadline_are_not_begun():
    slow = candidate(lambda: time.sleep(0.05))
    found = measured({"slow": slow, "next": failing()}, seconds=0.3)
    assert states(found) == {"slow": "measured", "next": "not measured"}
    assert found["next"]["reason"] == OUT_OF_TIME
    assert len(found["slow"]["times"]) < 1 + PATIENCE.passes


def test_a_broken_device_ends_the_entry_with_what_is_known():
    class Broken(WallStopwatch):
        def allocated(self):
            if noted and noted[-1]["crash"]["state"] == "raised":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return 0

    noted = []
    with pytest.raises(RuntimeError, match="illegal"):
        measure(
            contest({"fine": candidate(), "crash": failing(), "after": candidate()}),
            ["fine", "crash", "after"],
            Broken(),
            PATIENCE,
            time.monotonic() + 60,
            lambda records: noted.append({name: dict(record) for name, record in records.items()}),
        )
    assert states(noted[-1]) == {"fine": "not measured", "crash": "raised", "after": "not measured"}


class Made(Entry):
    """An entry whose contest is made by a function of the batch."""

    def contest(self, batch, device, dtype):
        return MAKES[self.model](batch)


MAKES = {}


def answers(make, batch=8):
    MAKES["made"] = make
    sent = []
    end = time.monotonic() + 60
    worker.answer(Made("attention", "made", True, batch), CPU, WallStopwatch(), PATIENCE, end, sent.append)
    return sent


def test_the_batch_is_halved_until_it_fits(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "attention", ("a",))
    error = torch.OutOfMemoryError("CUDA out of memory")
    kind, record = answers(lambda batch: contest({"a": failing(error) if batch > 2 else candidate()}))[-1]
    assert (kind, record["state"], record["batch"], record["images"]) == ("done", "measured", 2, 2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (failing(), "RuntimeError: no such instruction"),
        (lambda batch: contest({}, truth=failing()), "RuntimeError: no such instruction"),
        (lambda batch: contest({}, truth=failing(torch.OutOfMemoryError("full"))), "OutOfMemoryError: full"),
    ],
)
def test_an_entry_that_cannot_be_made_is_answered_with_its_error(make, reason):
    assert answers(lambda batch: make(batch) if make.__code__.co_argcount else make())[-1] == (
        "raised",
        reason,
    )


def test_a_process_that_ends_or_hangs_costs_its_entry_only(monkeypatch):
    class Connection:
        """Gives the messages of a process in turn; None is its end, and past the last it hangs."""

        def __init__(self, *messages):
            self.messages = list(messages)

        def send(self, request):
            pass

        def poll(self, seconds):
            return bool(self.messages)

        def recv(self):
            message = self.messages.pop(0)
            if message is None:
                raise EOFError
            return message

        def close(self):
            pass

    class Process:
        exitcode = -11

        def join(self):
            pass

        kill = join

    first = {
        "state": "measured",
        "contenders": {"a": {"state": "measured"}, "b": {"state": "not measured", "reason": ""}},
    }
    done = {"state": "measured", "contenders": {}}
    lives = [
        Connection(("so far", first), None),
        Connection(),
        Connection(("raised", "no")),
        Connection(("done", done)),
    ]

    def start(self):
        self._process, self._connection = Process(), lives.pop(0)

    monkeypatch.setattr(worker.Worker, "_start", start)
    entry = Entry("attention", "vitc_1gf", True, 4)
    with worker.Worker(dry_run=True) as measurer:
        crashed, hung, raised, fine = (measurer.measure(entry, 1.0, 60.0) for _ in range(4))
    assert crashed["failure"] == "the process ended with code -11"
    assert crashed["state"] == "measured"
    assert crashed["contenders"]["b"] == {"state": "not measured", "reason": crashed["failure"]}
    assert (hung["state"], hung["reason"]) == ("not measured", "stopped after 46 s")
    assert (raised["state"], raised["reason"]) == ("not measured", "no")
    assert fine == done


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
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_gpu_runner import Measurer, runner
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


ENTRY = {
    "title": "stem, m, forward",
    "contest": "stem, m, batch 8, forward",
    "state": "measured",
    "planned_batch": 16,
    "batch": 8,
    "images": 8,
    "flops": 2e9,
    "bytes": 6e9,
    "contenders": {
        name: {
            "state": "measured",
            "times": times,
            "host_seconds": 0.5,
            "peak_bytes": 3_000_000_000,
            "parity_error": 0.001,
        }
        for name, times in {
            "fastvitc triton": [1.0, 2.0, 4.0],
            "timm": [2.0, 3.0, 4.0],
            "slow": [9.0, 9.0, 9.0],
        }.items()
    }
    | {"fastvitc bn_relu": {"state": "wrong", "reason": "off"}},
}


def test_the_tables_figures_follow_from_median_times():
    first, second, third = rows(ENTRY, flops_peak=1e10)
    assert first == Row("fastvitc triton", 2.0, 0.5, 4.0, 0.1, 3.0, 3.0, 1.5, 0.001)  # ratios 2, 3/2, 1
    assert (second.contender, second.ratio, second.images_per_second) == ("timm", 1.0, 8 / 3)
    assert third.ratio == 3 / 9


def test_the_table_says_what_was_not_measured_and_which_batch_was():
    machine = {"device": "abacus", "nvidia_smi": None, "versions": {"torch": "2"}, "copy_peak": 5e9}
    machine |= {"flops_peak": 1e10, "flops_peak_source": "made up"}
    tests = {"state": "measured", "reason": "stopped", "passed": 7, "failed": 1, "skipped": 0}
    tests["failures"] = [{"name": "test_x", "message": "long\nE assert 1 == 2"}]
    missing = {
        "title": "stem, n, forward",
        "planned_batch": 2,
        "state": "not measured",
        "reason": OUT_OF_TIME,
    }
    results = {"label": "Measured", "settings": "", "machine": machine, "kernel_tests": tests}
    text = table({**results, "entries": [ENTRY, missing]})
    assert "| **fastvitc triton** | 2000.000 | 500.000 | 4 | 10.0% | 3 | 3.00 | 1.50 | 1.0e-03 |" in text
    assert "- fastvitc bn_relu: wrong: off" in text
    assert "Batch 8: 16 did not fit in memory." in text
    assert "### stem, n, forward\n\n- not measured: out of time" in text
    assert "7 passed, 1 failed, 0 skipped\nmeasured: stopped\n- test_x: E assert 1 == 2" in text


def run_tests(tmp_path, seconds, *tests):
    file = tmp_path / "test_made.py"
    file.write_text("import os, time\n" + "".join(f"def test_{test}\n" for test in tests))
    record = kernel_tests.run_kernel_tests(seconds, dry_run=False, targets=(str(file),))
    return record, {f["name"].split("::")[1]: f["message"] for f in record["failures"]}


def test_outcomes_up_to_the_time_limit_are_kept(tmp_path):
    tests = "right(): pass", "wrong(): assert 1 == 2", "hangs(): time.sleep(600)"
    record, failures = run_tests(tmp_path, 10.0, *tests)
    assert (record["passed"], record["failed"], record["exit_code"]) == (1, 1, None), record["tail"]
    assert "assert 1 == 2" in failures["test_wrong"]
    assert record["reason"] == "stopped after 10 s: the rest was not run"


def test_a_test_that_breaks_the_device_or_its_process_fails_no_other(tmp_path):
    pytest.importorskip("xdist")
    broken = "breaks(): raise RuntimeError('CUDA error: an illegal memory access')"
    record, failures = run_tests(tmp_path, 60.0, broken, "crashes(): os.abort()", "right(): pass")
    assert (record["passed"], record["failed"], record["exit_code"]) == (1, 2, 1), record["tail"]
    assert "CUDA error" in failures["test_breaks"]
    assert "crashed while running" in failures["test_crashes"]


def test_a_test_with_two_outcomes_has_failed(tmp_path):
    path = tmp_path / "outcomes"
    outcomes = [("a", "failed", "CUDA error"), ("a", "passed", ""), ("b", "passed", ""), ("c", "skipped", "")]
    path.write_text(
        "".join(json.dumps({"name": n, "outcome": o, "message": m}) + "\n" for n, o, m in outcomes)
    )
    counted = kernel_tests._counted(path)
    assert (counted["passed"], counted["failed"], counted["skipped"]) == (1, 1, 1)
    assert counted["failures"] == [{"name": "a", "message": "CUDA error"}]


@pytest.mark.parametrize(("missing", "run_at_all"), [("pytest", False), ("hypothesis", True)])
def test_what_the_kernel_tests_need_and_is_missing_is_said(missing, run_at_all, monkeypatch):
    monkeypatch.setattr(kernel_tests, "find_spec", lambda name: None if name == missing else True)
    commands = []
    monkeypatch.setattr(kernel_tests, "_run", lambda command, *_: commands.append(command) or 0)
    monkeypatch.setattr(kernel_tests.Path, "read_text", lambda *_, **__: "")
    record = kernel_tests.run_kernel_tests(1.0, dry_run=False)
    assert record["state"] == "not measured"
    assert f"{missing} is not installed" in record["reason"]
    assert bool(commands) == run_at_all
    assert not any("tests/kernels/attention" in command for command in commands)
