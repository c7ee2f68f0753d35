import sys

import pytest
from running import SMALL, program


@pytest.fixture
def ends(monkeypatch, capsys):
    """Runs a program in this process; gives its exit code and what it said on stderr, on one line."""

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [module.PROGRAM, *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            module.cli()
        return ended.value.code, " ".join(capsys.readouterr().err.replace("│", " ").split())

    return run


@pytest.fixture(scope="session")
def finished(few_digits, tmp_path_factory):
    """A finished run in a process of its own, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = program("train", "--data-dir", few_digits, "--model", "vitc_nano", *SMALL, "-o", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout
