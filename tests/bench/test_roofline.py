import json

import pytest

from bench import roofline
from bench.counting import Kernel
from bench.roofline import GPUS, Gpu, predict
from fastvitc.kernels.gpu.triton import INTERPRET

GPU = Gpu("made up", flops=100.0, bandwidth=10.0, source="nowhere")
MEMORY = Kernel("copy", distinct=40.0, flops=100.0)  # 4 s of memory, 1 s of products
CORES = Kernel("product", distinct=10.0, flops=300.0)  # 1 s and 3 s


@pytest.mark.parametrize(
    ("kernels", "seconds", "binds"),
    [
        ([MEMORY], 4.0, "memory"),
        ([CORES], 3.0, "tensor cores"),
        ([MEMORY, CORES], 7.0, "memory"),
        ([MEMORY, CORES, CORES], 10.0, "tensor cores"),
        ([], 0.0, "memory"),
    ],
)
def test_a_time_is_the_larger_term_of_each_kernel(kernels, seconds, binds):
    assert predict(GPU, kernels) == (seconds, binds)


def row(op, what, direction, *kernels, model="vitc_nano"):
    return {
        "op": op,
        "model": model,
        "what": what,
        "direction": direction,
        "kernels": [vars(kernel) for kernel in kernels],
    }


def run(rows, tmp_path):
    (tmp_path / "traffic.json").write_text(json.dumps(rows))
    roofline.main(["--traffic", str(tmp_path / "traffic.json"), "--json", str(tmp_path / "rows.json")])
    return json.loads((tmp_path / "rows.json").read_text())


def test_every_op_is_predicted_on_every_gpu_with_its_source(tmp_path, capsys):
    kernel = Kernel("k", distinct=2.039e12, flops=1.0)
    rows = run(
        [row("attention", "ours", "both", kernel), row("attention", "least", "both", kernel)], tmp_path
    )
    assert [(r["gpu"], r["part"], r["what"]) for r in rows] == [
        (gpu.name, "attention both", "ours") for gpu in GPUS
    ]
    assert rows[0]["seconds_per_image"] == 1.0
    text = capsys.readouterr().out.splitlines()
    assert "not measured on a GPU" in text[0]
    assert all(gpu.source in text[1 + i] for i, gpu in enumerate(GPUS))
    assert all(line.endswith("predicted") for line in text[1 + len(GPUS) :])
    assert {r["label"] for r in rows} == {"predicted"}


@pytest.mark.skipif(not INTERPRET, reason="the Triton op has to resolve on the CPU")
def test_a_training_step_is_the_sum_of_its_parts(tmp_path):
    stem, own = Kernel("stem", distinct=1e6), Kernel("op", distinct=1e3, flops=1e6)
    rows = run(
        [
            *(row("conv_stem", what, "both", stem) for what in ("eager", "inductor", "ours")),
            row("attention", "ours", "both", own),
        ],
        tmp_path,
    )
    h100 = {(r["what"], r["part"]): r for r in rows if r["gpu"] == "H100"}
    parts = ("stem", "attention", "rest of the encoder", "head and loss", "optimizer")
    for what in ("eager", "inductor", "ours"):
        seconds = sum(h100[what, f"step: {part}"]["seconds_per_image"] for part in parts)
        assert h100[what, "training step"]["seconds_per_image"] == pytest.approx(seconds)
        assert h100[what, "step: stem"]["bytes_per_image"] == 1e6
    assert h100["ours", "step: attention"]["bytes_per_image"] == 5 * 1e3  # 5 blocks
    rest = {what: h100[what, "step: rest of the encoder"] for what in ("eager", "inductor", "ours")}
    assert rest["ours"]["bytes_per_image"] <= rest["inductor"]["bytes_per_image"]
    assert rest["inductor"]["bytes_per_image"] < rest["eager"]["bytes_per_image"]
    flops = {r["flops_per_image"] for r in rest.values()}
    assert max(flops) == pytest.approx(min(flops))  # the same linear layers
