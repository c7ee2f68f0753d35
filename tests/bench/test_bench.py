import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import report
from bench.contest import Arena, Candidate, Contest, ParityError
from bench.scale import FULL, QUICK

ROOT = Path(__file__).parents[2]
TRUTH = torch.tensor([3.0, 4.0])  # of norm 5


def never():
    raise AssertionError("a wrong candidate was run")


def candidate(*tensors, run=never):
    return lambda: Candidate(run=run, tensors=lambda: list(tensors))


def contest(contenders, truth=lambda: [TRUTH], **options):
    return Contest("sum", truth=truth, contenders=contenders, **options)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (TRUTH + torch.tensor([0.5, 0.0]), "is off by 1.00e-01 of the norm of tensor 0, allowed are 2e-02"),
        (torch.tensor([3.0, torch.nan]), "is off by nan"),
        (torch.tensor([torch.inf, 4.0]), "is off by inf"),
        (TRUTH[None], r"gives shape \(1, 2\) for tensor 0"),
        (TRUTH[:1], r"gives shape \(1,\) for tensor 0"),
    ],
)
def test_a_wrong_contender_is_refused_and_not_run(tensor, words):
    with pytest.raises(ParityError, match=f"sum: theirs {words}"):
        Arena().enter(contest({"theirs": candidate(tensor)}), "theirs")


def test_every_tensor_is_compared():
    wrong_second = contest({"theirs": candidate(TRUTH, TRUTH + 1)}, truth=lambda: [TRUTH, TRUTH])
    with pytest.raises(ParityError, match="tensor 1"):
        Arena().enter(wrong_second, "theirs")


def test_a_contender_with_another_number_of_tensors_is_refused():
    with pytest.raises(ParityError, match="gives 0 of 1 tensors"):
        Arena().enter(contest({"theirs": candidate()}), "theirs")


def test_a_refused_contender_is_refused_at_every_pass():
    arena, wrong = Arena(), contest({"theirs": candidate(-TRUTH)})
    for _ in range(2):
        with pytest.raises(ParityError):
            arena.enter(wrong, "theirs")


def test_a_right_contender_comes_with_its_error_and_is_not_yet_run():
    close = TRUTH.double() + torch.tensor([0.05, 0.0]).double()
    run, error = Arena().enter(contest({"ours": candidate(close)}), "ours")
    assert run is never
    assert error == pytest.approx(0.01, rel=1e-6)


def test_a_tolerance_of_zero_asks_for_equality():
    arena = Arena()
    equal = contest({"same": candidate(TRUTH), "near": candidate(TRUTH * 1.0001)}, tolerance=0.0)
    assert arena.enter(equal, "same")[1] == 0
    with pytest.raises(ParityError):
        arena.enter(equal, "near")


def test_contenders_are_built_once_and_the_truth_is_computed_once_per_contest():
    calls = []

    def counted(name, result):
        def call():
            calls.append(name)
            return result

        return call

    def counted_contest(name):
        entries = {x: counted(f"{name} {x}", candidate(TRUTH)()) for x in ("a", "b")}
        return contest(entries, truth=counted(f"{name} truth", [TRUTH]))

    arena = Arena()
    for entered in (counted_contest("first"), counted_contest("second")):
        for _ in range(3):
            for name in ("a", "b"):
                arena.enter(entered, name)
    assert calls == [f"{c} {x}" for c in ("first", "second") for x in ("truth", "a", "b")]


@pytest.mark.parametrize("scale", [QUICK, FULL], ids=["quick", "full"])
def test_a_scale_alternates_over_passes_of_at_least_two_rounds(scale):
    assert scale.passes >= 3
    assert scale.passes % 2  # a median that was measured
    assert scale.rounds >= 2


def test_the_full_scale_measures_the_papers_models_at_224_pixels():
    assert {"vitc_1gf", "vitc_4gf"} <= FULL.models.keys()
    assert {config.image_size for config in FULL.models.values()} == {(224, 224)}


def entry(group, contender, number, median, *, flops=0, bytes=0, images=0):
    extra = {"contender": contender, "number": number, "flops": flops, "bytes": bytes, "images": images}
    return {"group": group, "stats": {"median": median}, "extra_info": extra}


MACHINE = {
    "device": "abacus",
    "versions": {"torch": "2.9"},
    "dtype": "fp32",
    "batch_size": 4,
    "convention": "two",
    "matmul_peak": 10.0,
    "copy_peak": 100.0,
}


@pytest.fixture
def results(tmp_path):
    """Writes benchmarks as pytest-benchmark does; gives the file."""

    def write(*benchmarks):
        path = tmp_path / "results.json"
        path.write_text(json.dumps({"machine_info": {"fastvitc": MACHINE}, "benchmarks": benchmarks}))
        return path

    return write


@pytest.fixture
def product(results):
    """Three passes of a group with two peers; slower from pass to pass, as on a machine that gets hot."""
    times = {"fastvitc": (1, 2, 4), "quick": (2, 3, 4), "slow": (10, 10, 10)}
    return results(
        *(
            entry("product", name, number, by_pass[number], flops=5, images=8)
            for number in range(3)
            for name, by_pass in times.items()
        )
    )


def test_the_report_has_medians_ratios_shares_and_rates(product):
    machine, groups = report.read(product)
    assert machine == MACHINE
    assert groups == {
        "product": [
            # Passes against the best peer, "quick": 2/1, 3/2, 4/4; 5 operations in 2 s of 10 in 1 s.
            report.Row("fastvitc", 2, 1.5, 5 / 2 / 10, 8 / 2),
            report.Row("quick", 3, 1.0, 5 / 3 / 10, 8 / 3),
            report.Row("slow", 10, 0.3, 5 / 10 / 10, 8 / 10),
        ]
    }


def test_bytes_count_where_flops_do_not(results):
    path = results(entry("copy", "fastvitc", 0, 4, bytes=200), entry("copy", "peer", 0, 2, bytes=200))
    _, groups = report.read(path)
    assert [row.peak_share for row in groups["copy"]] == [1.0, 0.5]


def test_a_group_without_peers_has_no_ratio(results):
    _, groups = report.read(results(entry("alone", "fastvitc", 0, 4)))
    assert groups == {"alone": [report.Row("fastvitc", 4, None, None, None)]}


def test_contenders_that_share_no_pass_have_no_ratio(results):
    _, groups = report.read(results(entry("g", "fastvitc", 0, 4), entry("g", "peer", 1, 2)))
    assert {row.contender: row.ratio for row in groups["g"]} == {"fastvitc": None, "peer": 1.0}


@pytest.fixture
def models(results):
    """Two models; of the second no inference and no backward of attention was timed."""
    times = {
        "training step, vitc_1gf, batch 4": {"fastvitc": 3, "fastvitc compiled": 2, "timm": 8, "timm compiled": 5},
        "inference, vitc_1gf, batch 4": {"fastvitc optimized": 2, "fastvitc reference": 1, "OpenVINO": 1},
        "attention, vitc_1gf, batch 4, 5 tokens, 1 heads of 8, forward": {"fastvitc native": 1, "sdpa": 9},
        "attention, vitc_1gf, batch 4, 5 tokens, 1 heads of 8, forward + backward": {
            "fastvitc native": 2, "fastvitc torch": 3, "sdpa": 4, "sdpa compiled": 3
        },
        "training step, vitc_4gf, batch 4": {"fastvitc": 4, "torchvision": 4},
        "block, vitc_4gf, batch 4, forward + backward": {"fastvitc": 4, "torchvision": 4},
    }  # fmt: skip
    path = results(*(entry(group, name, 0, t) for group, row in times.items() for name, t in row.items()))
    return report.read(path)[1]


def test_the_headline_has_our_best_contender_beside_the_best_peer(models):
    assert report.headline(models).splitlines() == [
        "| best peer's time / ours | vitc_1gf | vitc_4gf |",
        "|---|---|---|",
        "| training step | 2.50 (fastvitc compiled; timm compiled) | 1.00 (fastvitc; torchvision) |",
        "| inference | 0.50 (fastvitc optimized; OpenVINO) |  |",
        "| attention, forward + backward | 1.50 (fastvitc native; sdpa compiled) |  |",
    ]


def test_results_without_the_headlines_groups_have_none(product):
    assert report.headline(report.read(product)[1]) == ""


def test_the_report_begins_with_the_headline(models):
    text = report.table(MACHINE, models)
    assert report.headline(models) in text.split("###")[0]


def test_main_prints_the_table(product, capsys):
    report.main([str(product)])
    out = capsys.readouterr().out
    assert "Machine: abacus; torch 2.9." in out
    assert "### product" in out
    assert "| **fastvitc** | 2000.000 | 1.50 | 25.0% | 4 |" in out
    assert "| slow | 10000.000 | 0.30 | 5.0% | 1 |" in out


def test_main_draws_the_ratios(product, tmp_path, capsys):
    report.main([str(product), "--plot", str(tmp_path / "ratios.png")])
    with Image.open(tmp_path / "ratios.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (np.ptp(pixels, axis=2) > 60).mean() > 0.05  # the bar is coloured


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", "3", '{"machine_info": {}, "benchmarks": []}', '{"machine_info": null}']
)
def test_a_foreign_file_ends_in_one_message(content, tmp_path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        report.main([str(path)])
    assert str(ended.value.code).startswith(f"{path} holds no results of this suite")
    assert "\n" not in ended.value.code


def python(*args):
    # Without the variables of a parallel test run, in which pytest-benchmark measures nothing.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env = {**outer, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=250
    )


def test_the_programs_message_comes_with_a_nonzero_exit(tmp_path):
    done = python("-m", "bench.report", tmp_path / "none.json")
    assert done.returncode == 1
    assert "holds no results of this suite" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_quick_suite_runs_end_to_end(tmp_path):
    path = tmp_path / "results.json"
    done = python(
        "-m", "pytest", "bench/test_ops.py", "--quick", "-p", "no:xdist", "-p", "no:cacheprovider",
        "-k", "bn_relu and forward and not backward and not compiled and not stem and not triton",
        "--benchmark-json", path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    machine, groups = report.read(path)
    (rows,) = groups.values()
    assert {row.contender for row in rows} >= {"fastvitc reference", "fastvitc torch", "batch_norm, relu"}
    assert all(row.ratio > 0 and row.peak_share > 0 for row in rows)
    assert all(
        bench["extra_info"]["parity_error"] <= 2e-2 for bench in json.loads(path.read_text())["benchmarks"]
    )
    assert f"Machine: {machine['device']}" in report.table(machine, groups)
