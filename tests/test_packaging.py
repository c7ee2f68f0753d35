import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest


@pytest.fixture(scope="module")
def source(tmp_path_factory, request):
    """A copy of the checkout, so that building leaves nothing behind in it."""
    target = tmp_path_factory.mktemp("source") / "fastvitc"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    return shutil.copytree(request.config.rootpath, target, symlinks=True, ignore=ignored)


def build(kind, source, target):
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


SOURCES = (".py", ".cpp", ".h")


def sources_of(wheel):
    return {name for name in wheel.namelist() if name.endswith(SOURCES)}


def modules_of(source):
    """Every Python module and every source of the CPU kernels, by their place in the wheel."""
    kernels = {
        f"fastvitc/kernels/{p.relative_to(source / 'kernels')}"
        for p in (source / "kernels").rglob("*")
        if p.suffix in SOURCES
    }
    rest = {
        str(p.relative_to(source)) for p in (source / "fastvitc").rglob("*.py") if "kernels" not in p.parts
    }
    return kernels | rest


def test_the_wheel_holds_every_module_and_no_top_level_kernels(source, tmp_path):
    with zipfile.ZipFile(build("wheel", source, tmp_path)) as wheel:
        names = set(wheel.namelist())
        assert sources_of(wheel) == modules_of(source)
    assert {"fastvitc/py.typed", "fastvitc/kernels/attention/native.cpp"} <= names


def test_the_sdist_builds_the_same_wheel(source, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (p for p in tmp_path.iterdir() if p.is_dir())
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path)) as wheel:
        assert sources_of(wheel) == modules_of(source)


def test_the_kernels_are_one_package(request):
    import fastvitc.kernels

    link = request.config.rootpath / "fastvitc" / "kernels"
    assert link.is_symlink()
    assert fastvitc.kernels.__name__ == "fastvitc.kernels"


def test_the_changelog_opens_with_the_packaged_version(request, sdist):
    newest = re.search(r"^## (\S+)", (request.config.rootpath / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sdist.name == f"fastvitc-{newest.group(1)}.tar.gz"
