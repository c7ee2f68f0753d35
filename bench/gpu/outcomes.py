"""A pytest plugin: a line of JSON for each outcome, in the file named by FASTVITC_OUTCOMES, whatever comes after.

A process whose GPU context a test has broken would fail every later test: under pytest-xdist it ends, and is replaced.
"""

import json
import os
from pathlib import Path

import pytest

_BROKEN = ("CUDA error", "CUDA driver error", "device-side assert")


def _write(name: str, outcome: str, message: str = "") -> None:
    line = json.dumps({"name": name, "outcome": outcome, "message": message}) + "\n"
    with Path(os.environ["FASTVITC_OUTCOMES"]).open("a") as file:
        file.write(line)


class _Outcomes:
    def __init__(self, worker: bool) -> None:
        self._worker = worker

    def pytest_collectreport(self, report):
        if report.failed:
            _write(report.nodeid, "failed", report.longreprtext[-1500:])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report):
        if report.passed and report.when != "call":
            return
        text = report.longreprtext if report.failed else ""
        passed_on = hasattr(report, "node")  # the process that ran the test has written it, unless it crashed
        if not passed_on or (report.failed and "crashed while running" in text):
            _write(report.nodeid, report.outcome, text[-1500:])
        if self._worker and any(word in text for word in _BROKEN):
            os._exit(1)


def pytest_configure(config):
    config.pluginmanager.register(_Outcomes(worker=hasattr(config, "workerinput")))
