"""The build of the CPU kernels: once, for all processes, or a clear reason why not."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastvitc.kernels import BackendUnavailable, attention, chosen
from fastvitc.kernels.cpu import build
from fastvitc.programs.info import InfoSettings, report

obstacle = build._obstacle.__wrapped__  # as a process asks that has not yet

TINY = """
#include <torch/library.h>
TORCH_LIBRARY_FRAGMENT(fastvitc_native, library) { library.def("one() -> int", [] { return int64_t{1}; }); }
"""
BUILD_TINY = """
import sys
from pathlib import Path
from fastvitc.kernels.cpu import build
build._sources = lambda: [Path(sys.argv[1])]
print(build.no_native("cpu"))
import torch
print(torch.ops.fastvitc_native.one())
"""


@pytest.fixture
def empty(cache):
    """The cache folder without the kernels that all tests share."""
    (cache / "native").unlink(missing_ok=True)
    return cache


def compiler(folder, script):
    """An executable that stands in for the C++ compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert "no C++ compiler: /no/such/compiler" in obstacle()
    assert "install g++ or clang++, or set CXX" in obstacle()


def test_a_failed_build_gives_the_compilers_message_and_leaves_nothing(monkeypatch, tmp_path, empty, capfd):
    script = 'case "$*" in *version*|*-v) echo compiler 1.0;; *) echo this flag is unknown; exit 1;; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    assert "this flag is unknown" in obstacle()
    assert "building the CPU kernels" in capfd.readouterr().err
    assert [path.suffix for path in (empty / "native").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_names_the_variable_to_set(monkeypatch, empty):
    (empty / "file").write_text("")
    monkeypatch.setenv("FASTVITC_CACHE", str(empty / "file"))
    assert "set FASTVITC_CACHE to a folder of your own" in obstacle()


def test_where_it_cannot_run_auto_goes_on_info_says_why_and_an_explicit_choice_raises(monkeypatch):
    monkeypatch.setattr(build, "_obstacle", lambda: "the compiler said no")
    assert chosen("cpu")["attention"] == "torch"
    assert "native (the compiler said no)" in report(InfoSettings(device="cpu"))
    qkv = torch.randn(1, 3, 24)
    torch.testing.assert_close(attention(qkv, 1), attention(qkv, 1, backend="torch"), rtol=0, atol=0)
    with pytest.raises(BackendUnavailable, match="'native' is not available on cpu: the compiler said no"):
        attention(qkv, 1, backend="native")


@pytest.mark.slow
def test_processes_that_need_it_at_once_build_it_once_and_later_ones_not_at_all(tmp_path, empty):
    source = tmp_path / "native.cpp"
    source.write_text(TINY)

    def run(_):
        return subprocess.run(
            [sys.executable, "-c", BUILD_TINY, str(source)], capture_output=True, text=True, timeout=250
        )

    with ThreadPoolExecutor() as pool:
        answers = [*pool.map(run, range(2)), run(None)]
    assert [answer.stdout.split() for answer in answers] == [["None", "1"]] * 3, answers[0].stderr
    assert sum("built in" in answer.stderr for answer in answers) == 1
    assert len(list((empty / "native").glob("*.so"))) == 1


@pytest.mark.parametrize("changed", ["source", "compiler", "flags", "torch"])
def test_a_change_of_anything_that_it_is_made_from_makes_another(changed, monkeypatch, tmp_path):
    source = tmp_path / "native.cpp"
    source.write_text(TINY)
    monkeypatch.setattr(build, "_sources", lambda: [source])
    before = build._key("g++ 12", ["-O3"])
    assert build._key("g++ 12", ["-O3"]) == before
    if changed == "source":
        source.write_text(TINY + "// changed")
    if changed == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    compiler = "g++ 13" if changed == "compiler" else "g++ 12"
    assert build._key(compiler, ["-O2" if changed == "flags" else "-O3"]) != before


@pytest.mark.parametrize(
    ("capability", "expected"), [("AVX512", "-mavx512f"), ("AVX2", "-mavx2"), ("DEFAULT", "DEFAULT")]
)
def test_the_flags_are_those_of_the_cpu_features_in_use(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    flags = build._flags()
    assert any(expected in flag for flag in flags)
    assert f"-DCPU_CAPABILITY={capability}" in flags
    assert ("-mavx512f" in flags) == (capability == "AVX512")


@pytest.fixture
def tiny_library(empty, tmp_path, monkeypatch):
    """The library of a source of one line, built; its file."""
    source = tmp_path / "native.cpp"
    source.write_text(TINY)
    run = subprocess.run(
        [sys.executable, "-c", BUILD_TINY, str(source)],
        capture_output=True,
        text=True,
        timeout=250,
        umask=0o002,
    )
    assert run.stdout.split() == ["None", "1"], run.stderr
    (library,) = (empty / "native").glob("*.so")
    return library, source


@pytest.mark.slow
def test_a_damaged_library_is_built_again_and_one_that_others_may_write_is_refused(tiny_library):
    library, source = tiny_library

    def answer():
        command = [sys.executable, "-c", BUILD_TINY, str(source)]
        return subprocess.run(command, capture_output=True, text=True, timeout=250)

    assert library.stat().st_mode & 0o077 == 0
    library.write_bytes(library.read_bytes()[:1000])
    again = answer()
    assert again.stdout.split() == ["None", "1"], again.stderr
    library.chmod(0o666)
    assert f"others may write to {library}" in answer().stdout
    library.chmod(0o600)
    library.parent.chmod(0o777)
    assert f"others may write to {library.parent}" in answer().stdout


def test_other_devices_have_no_native_kernels():
    assert "run on a CPU" in build.no_native("cuda")


CHECK = """
import torch
from fastvitc.kernels import add_layer_norm, attention, bias_gelu, bn_relu
from fastvitc.kernels.cpu import build
assert build.no_native("cpu") is None
assert build._flags()[3] == "-DCPU_CAPABILITY={name}", build._flags()
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    def both(op, *inputs, **options):
        results = []
        for backend, inputs in (("native", inputs), ("reference", [t.double() for t in inputs])):
            leaves = [t.clone().requires_grad_() for t in inputs]
            outs = op(*leaves, backend=backend, **options)
            outs = outs if isinstance(outs, tuple) else (outs,)
            results.append([*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), leaves)])
        for found, expected in zip(*results):
            assert (found - expected).norm() <= tolerance * expected.norm(), (op, dtype)
    both(attention, torch.randn(2, 50, 3 * 2 * 40).to(dtype), num_heads=2)
    x, bias = torch.randn(50, 100).to(dtype), torch.randn(100)
    both(bias_gelu, x, bias)
    both(add_layer_norm, x, x.flip(0), bias, bias)
    def norm(x, weight, bias, backend):
        mean, var = torch.zeros_like(bias), torch.ones_like(bias)
        return bn_relu(x, mean.detach(), var.detach(), weight, bias, True, backend=backend)
    if dtype == torch.float32:  # dx is a small difference of large values
        both(norm, torch.randn(2, 9, 7, 5), torch.rand(9), torch.randn(9))
"""


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "isa"), [("avx2", "AVX2"), ("default", "SSE41")])
def test_the_kernels_are_right_with_the_cpus_features_turned_off(capability, isa, cache):
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "ONEDNN_MAX_CPU_ISA": isa,
        "FASTVITC_CACHE": str(cache),
    }
    code = CHECK.replace("{name}", capability.upper())
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280
    )
    assert answer.returncode == 0, answer.stderr
