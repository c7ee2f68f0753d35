import json

import pytest

from bench.gpu import kernel_tests


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
