"""One process of a machine indexes the images, and all map what it wrote."""

import os
import subprocess
import sys

import pytest

_SHARED = """
import os, sys, tempfile
from pathlib import Path
from fastvitc.data import write_index
from fastvitc.programs.command import run_command
from fastvitc.training.images import shared_images
from fastvitc.training.process import process_group

CASE, ROOT, RANK = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
if CASE in ("two machines", "other images", "broken there"):
    os.environ["LOCAL_RANK"] = "0"
elif CASE == "no local rank 0":
    os.environ["LOCAL_RANK"] = "1"

def write(place):
    (ROOT / f"built by {RANK}").touch()
    data = "more" if RANK and CASE == "other images" else "none" if RANK and CASE == "broken there" else "data"
    if CASE == "full":
        (place / "train.names").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")
    write_index(ROOT / data, place)

def mapped():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "fastvitc-" in line and ".labels" in line}

def main():
    with process_group("cpu") as process:
        train, val = shared_images(process, write)
        assert (len(train), len(val), train.read(1)) == (3, 1, b"2")
        inodes = process.gather(mapped())
        assert all(len(found) == 2 for found in inodes)  # the labels of two splits
        assert (inodes[0] == inodes[1]) == (CASE == "alike"), inodes

run_command("shared", main)
"""


@pytest.fixture
def shared(tmp_path):
    """Runs two processes that share an index; (exit code, stderr, which ranks built, what temporary files are left)."""
    for name, images in (("data", "123"), ("more", "1234")):
        for split, numbers in (("train", images), ("val", "1")):
            folder = tmp_path / name / split / "cat"
            folder.mkdir(parents=True)
            for number in numbers:
                (folder / f"{number}.jpg").write_text(number)
    (tmp_path / "shared.py").write_text(_SHARED)
    (tmp_path / "tmp").mkdir()

    def run(case):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*command, str(tmp_path / "shared.py"), case, str(tmp_path)], capture_output=True, text=True, timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path / "tmp")},
        )  # fmt: skip
        built = sorted(p.name[-1] for p in tmp_path.glob("built by *"))
        left = [p for place in (tmp_path / "tmp").glob("fastvitc-*") for p in place.iterdir() if p.is_dir()]
        return done.returncode, done.stderr, built, left

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("case", "builders"), [("alike", ["0"]), ("two machines", ["0", "1"])])
def test_one_process_of_each_machine_makes_the_index_and_all_of_them_map_it(case, builders, shared):
    code, said, built, left = shared(case)
    assert code == 0, said
    assert (built, left) == (builders, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("full", "cannot keep the index of the images in a temporary folder ([Errno 28] No space left"),
        ("broken there", "there is no folder"),
        ("other images", "rank 1 has other images than rank 0: 4 and 1 in"),
        ("no local rank 0", "no process of this machine has LOCAL_RANK 0; number those of a machine"),
    ],
)
def test_a_failure_ends_all_processes_with_one_message_and_leaves_no_folder(case, message, shared):
    code, said, _, left = shared(case)
    assert code == 1
    assert f"shared: error: {message}" in said
    assert "Traceback" not in said.partition("shared: error")[0]
    assert left == []
