import json
import os
import subprocess
import sys

import pytest


def resources(arch, path, root):
    # Compiled for a GPU, hence without the interpreter that the other tests run kernels in.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "bench.resources",
        "--quick",
        "--arch",
        arch,
        "--json",
        str(path),
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=env)


@pytest.mark.parametrize(("arch", "unit"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_kernels_fit_and_use_the_units_of_the_architecture(arch, unit, tmp_path, request):
    done = resources(arch, tmp_path / "rows.json", request.config.rootpath)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["arch"] for row in rows} == {arch}
    assert all(row["spills"] == row["stack"] == 0 for row in rows)
    attention = [row for row in rows if row["kernel"].startswith("_attention")]
    assert [row["tensor_core"] for row in attention] == [unit, unit]
    assert len(rows) == 7
