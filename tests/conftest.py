import os
import shutil
from importlib.util import find_spec

import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
    torch.backends.cudnn.allow_tf32 = False  # float32 is held to float32's error
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", default_cache_dir()
)  # shared: each test has a cache folder of its own

from fastvitc.data import digits_folder
from fastvitc.files import cache_folder
from fastvitc.kernels.cpu.build import no_native

# One thread per test process: the suite runs in parallel processes instead.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _repeat_drawn_examples():
    """A failure comes from a change, and fails again: neither shapes nor the values in them are drawn anew."""
    if find_spec("hypothesis") is None:  # its tests are then left out
        return
    import hypothesis

    hypothesis.register_random(_Torch)
    hypothesis.settings.register_profile("repeated", derandomize=True)
    hypothesis.settings.load_profile("repeated")


class _Torch:
    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_repeat_drawn_examples()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run what is marked full: minutes more")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out what is marked full, and puts first what is marked slow, for parallel processes to end together."""
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A process that has nothing left takes over tests of another, unless --dist says otherwise."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _native_library():
    """The folder of the CPU kernels; they are built, if need be, once for all test processes."""
    no_native("cpu")
    return cache_folder() / "native"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch, _native_library):
    """A cache folder with nothing but the CPU kernels: what was measured on this machine changes no test."""
    from fastvitc.kernels.choice import measured

    folder = tmp_path_factory.mktemp("cache")
    if _native_library.exists():
        (folder / "native").symlink_to(_native_library)
    monkeypatch.setenv("FASTVITC_CACHE", str(folder))
    monkeypatch.setattr(measured, "_known", {})
    return folder


@pytest.fixture
def nan_memory():
    """Uninitialised memory is NaN, so that a result that reads it cannot look right."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernel_device():
    """Tensors are made where Triton's kernels run: on the GPU, or for its interpreter on the CPU."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """Three classes of digits, 20 training and 5 validation images each."""
    source = digits_folder(tmp_path_factory.mktemp("cache"))
    target = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 20), ("val", 5)):
        for digit in "012":
            (target / split / digit).mkdir(parents=True)
            for path in sorted((source / split / digit).iterdir())[:count]:
                shutil.copy(path, target / split / digit)
    return target
