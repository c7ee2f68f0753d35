"""The CPU kernels: every op's native.cpp in one library, built by the user's C++ compiler when it is first needed.

The library is kept in the cache folder under a name made of the sources, the compiler, PyTorch's version and the CPU
features in use, so that a change of any builds another. One process builds, under a lock that dies with it; others
wait. `CXX` names the compiler, `FASTVITC_CXXFLAGS` adds to its flags.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from fastvitc.files import cache_folder, check_private, locked, private_folder, write_atomically
from fastvitc.kernels.cpu.cpuinfo import cpu_flags

#: PyTorch's name of the CPU features in use (`ATEN_CPU_CAPABILITY` lowers it) → the compiler's flags for them.
_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
_NAMESPACE = "fastvitc_native"


def _worth_saying(record: logging.LogRecord) -> bool:
    """PyTorch's first C++ build, torch.compile's too, tells a CPU's user that there is a CUDA toolkit and no GPU."""
    return "No CUDA runtime is found" not in record.getMessage()


logging.getLogger("torch.utils.cpp_extension").addFilter(_worth_saying)


def no_native(device_type: str) -> str | None:
    """Why the native kernels cannot run on a device type, None when they can; builds them where they are not yet."""
    if device_type != "cpu":
        return "the native kernels run on a CPU"
    return _obstacle()


@cache
def _obstacle() -> str | None:
    """Load the library, after building it if need be; why that failed, or None."""
    if sys.platform != "linux":
        return "the native kernels are built on Linux only"
    try:
        compiler = _compiler()
        flags = _flags()
        path = _folder() / f"{_key(compiler, flags)}.so"
        if _is_whole(path) or not _build(path, flags):
            torch.ops.load_library(path)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error)
    return None


def _folder() -> Path:
    folder = cache_folder() / "native"
    try:
        return private_folder(folder)
    except OSError as error:
        raise RuntimeError(
            f"cannot write to {folder} ({error.strerror}); set FASTVITC_CACHE to a folder of your own"
        ) from error


def _is_whole(path: Path) -> bool:
    """Whether a library was built before and is as it was then; a truncated one would end the process that loads it."""
    if not path.exists() or not _digest_file(path).exists():
        return False
    check_private(path)
    check_private(_digest_file(path))
    return _digest_file(path).read_text() == _digest(path)


def _put(path: Path, content: bytes) -> None:
    path.chmod(0o600)  # whatever this user lets others write elsewhere
    path.write_bytes(content)


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compiler() -> str:
    """Name and version of the C++ compiler that PyTorch's builds take."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"no C++ compiler: {shlex.join(command)} --version failed ({error}); install g++ or clang++, or set CXX"
        ) from error
    return answer.stdout


def _sources() -> list[Path]:
    """One file per op; what they include comes last."""
    kernels = Path(__file__).resolve().parents[1]
    return [*sorted(kernels.glob("*/native.cpp")), *sorted(kernels.glob("cpu/*.h"))]


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    chosen = _FLAGS.get(capability, [])
    name = capability if capability in _FLAGS else "DEFAULT"
    if name == "AVX512" and "avx512_bf16" in cpu_flags():
        chosen = [*chosen, "-mavx512bf16"]
    macros = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
    added = shlex.split(os.environ.get("FASTVITC_CXXFLAGS", ""))
    return ["-O3", "-fopenmp", "-fno-math-errno", *macros, *chosen, *added]


def _key(compiler: str, flags: list[str]) -> str:
    parts = [compiler, *flags, torch.__version__, platform.machine()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in _sources():
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _build(path: Path, flags: list[str]) -> bool:
    """Build the library into `path` and load it; False if another process has meanwhile built it."""
    with locked(path.with_suffix(".lock")):
        if _is_whole(path):
            return False
        for unfinished in path.parent.glob(f".{path.stem}.*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        print("fastvitc: building the CPU kernels, once for this machine ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            try:
                built = _compile(Path(folder), flags)
            except (ImportError, OSError, RuntimeError):
                print(
                    "fastvitc: that failed (fastvitc-info says why); PyTorch's ops are taken", file=sys.stderr
                )
                raise
            digest = _digest(built)
            write_atomically(path, lambda temporary: _put(temporary, built.read_bytes()))
            write_atomically(_digest_file(path), lambda temporary: _put(temporary, digest.encode()))
        print(f"fastvitc: built in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return True


def _compile(folder: Path, flags: list[str]) -> Path:
    """The library, built in a folder and loaded."""
    from torch.utils.cpp_extension import load

    # One name per source: object files are named after them, and all are called native.cpp.
    files = []
    for source in _sources():
        named = folder / source.parent.name / source.name
        if source.suffix == ".cpp":
            named = named.with_stem(source.parent.name)
            files.append(str(named))
        named.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, named)
    load(_NAMESPACE, files, extra_cflags=flags, build_directory=str(folder), is_python_module=False)
    return folder / f"{_NAMESPACE}.so"
