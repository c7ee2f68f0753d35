import time

import pytest
from gpu_contests import PATIENCE, TRUTH, candidate, contest, failing

from bench.gpu.measure import OUT_OF_TIME, measure
from bench.gpu.stopwatch import WallStopwatch


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
