"""Options, order and header of the throughput suite: `pytest bench/ [--quick]`."""

import math
import time
from dataclasses import replace

import pytest
import torch

from bench.contest import CONVENTION, Arena
from bench.runtimes import PACKAGES
from bench.scale import FULL, QUICK
from fastvitc.kernels import chosen
from fastvitc.models.config import preset
from fastvitc.training.process import pick_device
from fastvitc.tuning.machine import copy_peak, describe, matmul_peak, versions


def pytest_addoption(parser):
    group = parser.getgroup("fastvitc throughput suite")
    group.addoption("--quick", action="store_true", help="small sizes, two or three minutes")
    group.addoption("--models", help="presets to measure, separated by commas")
    group.addoption("--batch-size", type=int, help="images per call")
    group.addoption("--dtype", default="bf16", choices=["bf16", "fp32"], help="autocast dtype of the models")
    group.addoption("--bench-device", default="auto", help="cpu, cuda or auto")


def pytest_configure(config):
    config.option.benchmark_group_by = "group"
    config.option.benchmark_sort = "mean"
    config.option.benchmark_columns = ["median", "min", "max", "rounds"]
    # A contender that fails its parity is not timed; its failure says enough.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    config.scale = _scale(config)
    config.device = pick_device(config.getoption("--bench-device"))
    config.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.getoption("--dtype")]


def _scale(config):
    scale = QUICK if config.getoption("--quick") else FULL
    if config.getoption("--models"):
        scale = replace(
            scale, models={name: preset(name) for name in config.getoption("--models").split(",")}
        )
    if config.getoption("--batch-size"):
        scale = replace(scale, batch_size=config.getoption("--batch-size"))
    return scale


def pytest_sessionstart(session):
    config = session.config
    config.machine = {
        "device": describe(config.device),
        "versions": versions(*PACKAGES),
        "dtype": config.getoption("--dtype"),
        "batch_size": config.scale.batch_size,
        "convention": CONVENTION,
        "ops": chosen(config.device),
        "matmul_peak": matmul_peak(config.device, config.dtype),
        "copy_peak": copy_peak(config.device),
    }


def pytest_report_header(config):
    m = config.machine
    return [
        f"machine: {m['device']}",
        f"versions: {', '.join(f'{name} {version}' for name, version in m['versions'].items())}",
        f"dtype {m['dtype']}, batch {m['batch_size']}; {CONVENTION}; ops: {m['ops']}",
        f"peaks measured now: {m['matmul_peak'] / 1e12:.3g}e12 FLOP/s ({m['dtype']} matmul), "
        f"{m['copy_peak'] / 1e9:.3g}e9 B/s (copy)",
    ]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastvitc"] = config.machine


def pytest_generate_tests(metafunc):
    """A module's `contests(scale, device, dtype)` become tests: passes outermost, so that contenders alternate."""
    if "entry" not in metafunc.fixturenames:
        return
    config = metafunc.config
    entries = [
        pytest.param((contest, contender, number), id=f"{contest.name}-{contender}-pass{number}")
        for contest in metafunc.module.contests(config.scale, config.device, config.dtype)
        for number in range(config.scale.passes)
        for contender in contest.contenders
    ]
    metafunc.parametrize("entry", entries)


@pytest.fixture(scope="session")
def arena():
    return Arena()


@pytest.fixture
def timed(benchmark, arena, request):
    """Checks an entry's parity, then times it; the entry's figures go into the benchmark's extra_info."""

    def run(entry):
        contest, contender, number = entry
        call, error = arena.enter(contest, contender)
        scale = request.config.scale
        synchronize = torch.cuda.synchronize if request.config.device.type == "cuda" else (lambda: None)

        def one_round():
            call()
            synchronize()

        start = time.perf_counter()
        one_round()
        iterations = max(1, math.ceil(scale.seconds / (time.perf_counter() - start)))
        benchmark.group = contest.name
        benchmark.extra_info.update(
            contender=contender,
            number=number,
            parity_error=error,
            flops=contest.flops,
            bytes=contest.bytes,
            images=contest.images,
        )
        benchmark.pedantic(one_round, rounds=scale.rounds, iterations=iterations)

    return run
