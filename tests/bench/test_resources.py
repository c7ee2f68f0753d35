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


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "unit"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_kernels_fit_and_use_the_units_of_the_architecture(arch, unit, tmp_path, request):
    done = resources(arch, tmp_path / "rows.json", request.config.rootpath)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["arch"] for row in rows} == {arch}
    assert all(row["spills"] == row["stack"] == 0 for row in rows)
    # Of each kernel the first; the first layer's weight gradient, the last, has too few channels for HGMMA.
    products = {row["kernel"]: row["tensor_core"] for row in reversed(rows)}
    products = {name: found for name, found in products.items() if not name.startswith("_bn")}
    backward = "_attention_bwd_resident_kernel" if arch == "sm_90" else "_attention_bwd_kernel"
    assert products.keys() == {
        "_attention_fwd_kernel",
        backward,
        "_conv_fwd_kernel",
        "_tokens_fwd_kernel",
        "_conv_bwd_input_kernel",
        "_conv_bwd_weight_kernel",
    }
    assert set(products.values()) == {unit}
    assert {row["kernel"] for row in rows} - products.keys() == {
        "_bn_stats_kernel",
        "_bn_merge_kernel",
        "_bn_relu_apply_kernel",
        "_bn_relu_bwd_sums_kernel",
        "_bn_bwd_merge_kernel",
        "_bn_relu_bwd_apply_kernel",
    }
