import json

import torch

from fastvitc.training.profile import Profile


def work(profile, steps):
    return [torch.ones(8, 8).mm(torch.ones(8, 8)) is not None and profile.step() for _ in range(steps)]


def test_the_trace_holds_the_steps_after_the_first_ones(tmp_path):
    profile = Profile(2, tmp_path / "trace.json")
    assert work(profile, 7) == [False, False, False, False, True, False, False]
    assert not profile.close()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2


def test_too_few_steps_leave_no_trace_and_are_told(tmp_path):
    profile = Profile(2, tmp_path / "trace.json")
    assert not any(work(profile, 4))
    assert profile.close()
    assert not list(tmp_path.iterdir())
