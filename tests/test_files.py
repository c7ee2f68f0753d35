import pytest

from fastvitc.files import write_atomically


def fail_while_writing(path):
    path.write_bytes(b"half of the new")
    raise OSError("no space left on device")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "file", fail_while_writing)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_a_folder_that_a_failing_write_made_holds_no_temporary_file(tmp_path):
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "new" / "file", fail_while_writing)
    assert not list((tmp_path / "new").iterdir())
