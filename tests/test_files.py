import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastvitc.files import remove_unfinished, temporary_folder, write_atomically


def fail_while_writing(path):
    path.write_bytes(b"half of the new")
    raise OSError("no space left on device")


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    for text in ("old", "new"):
        write_atomically(tmp_path / "deep" / "file", lambda path, text=text: path.write_text(text))
    assert [(p.name, p.read_text()) for p in (tmp_path / "deep").iterdir()] == [("file", "new")]


def test_two_writers_of_one_process_id_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    names = []

    def write(path):
        names.append(path.name)
        path.write_text(path.name)
        if len(names) == 1:
            write_atomically(tmp_path / "file", write)

    write_atomically(tmp_path / "file", write)
    assert len(set(names)) == 2
    assert (tmp_path / "file").read_text() == names[0]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    left = []

    def killed(path):
        path.write_text("half")
        left.append(path)
        raise SystemExit

    (tmp_path / "run" / "last").mkdir(parents=True)
    for name in ("a", "last/b"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
            with pytest.raises(SystemExit):
                write_atomically(tmp_path / "run" / name, killed)
    (tmp_path / "run" / ".hidden").write_text("a user's")
    assert all(path.exists() for path in left)
    for folder in ("run", "run/last"):
        remove_unfinished(tmp_path / folder)
    assert not any(path.exists() for path in left)
    assert (tmp_path / "run" / ".hidden").exists()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "file", fail_while_writing)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_a_folder_that_a_failing_write_made_holds_no_temporary_file(tmp_path):
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "new" / "file", fail_while_writing)
    assert not list((tmp_path / "new").iterdir())


def test_a_temporary_folder_is_private_and_goes_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as folder:
        (folder / "file").write_text("")
        assert tmp_path in folder.parents
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


def test_a_killed_processs_temporary_folder_goes_and_a_living_ones_stays(tmp_path, monkeypatch):
    code = "import sys; from fastvitc.files import temporary_folder\n"
    code += "with temporary_folder() as folder: print(folder, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as other:
        left = Path(other.stdout.readline().strip())
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with temporary_folder():
            assert left.exists()
        other.kill()
    with temporary_folder():
        assert not left.exists()
