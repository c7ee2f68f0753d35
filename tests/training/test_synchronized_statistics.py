"""BatchNorm over a process group: two processes compute what one computes of both their batches."""

import os
import subprocess
import sys

import pytest

_COMPARE = """
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fastvitc import ConvStem, StemConfig, create_model
from fastvitc.kernels import bn_relu
from fastvitc.kernels.choice.backends import BackendUnavailable

dist.init_process_group("gloo")
rank = dist.get_rank()
mine = slice(3 * rank, 3 * rank + 3)
torch.manual_seed(0)
STEM = StemConfig((8, 16, 16, 32), (3, 3, 3, 1), (2, 2, 2, 1))


def compare(found, expected):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def normalized(x, dy, group, backend):
    x, weight, bias = x.clone().requires_grad_(), torch.linspace(1, 2, 5), torch.linspace(-1, 1, 5)
    weight.requires_grad_(), bias.requires_grad_()
    statistics = torch.zeros(5), torch.ones(5)
    y = bn_relu(x, *statistics, weight, bias, True, process_group=group, backend=backend)
    return [y, *torch.autograd.grad(y, (x, weight, bias), dy)], statistics


def stemmed(stem, images, weights):
    tokens = stem(images)
    return torch.autograd.grad((tokens * weights).sum(), list(stem.parameters()))


def check(backend):
    x, dy = torch.randn(6, 5, 3, 4) + 2, torch.randn(6, 5, 3, 4)
    (y, dx, dweight, dbias), whole = normalized(x, dy, None, backend)
    (my_y, my_dx, my_dweight, my_dbias), shared = normalized(x[mine], dy[mine], dist.group.WORLD, backend)
    for total in (my_dweight, my_dbias):
        dist.all_reduce(total)
    compare((my_y, my_dx, my_dweight, my_dbias, *shared), (y[mine], dx[mine], dweight, dbias, *whole))

    stem = ConvStem(STEM, backend=backend)
    shared_stem = torch.nn.SyncBatchNorm.convert_sync_batchnorm(ConvStem(STEM, backend=backend))
    shared_stem.load_state_dict(stem.state_dict())
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    weights = torch.randn(6, 4, 32)
    expected = stemmed(stem, images, weights)
    found = stemmed(shared_stem, images[mine], weights[mine])
    for gradient in found:
        dist.all_reduce(gradient)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-3 * e.abs().max().item())
    compare(
        [b for n in shared_stem.norms for b in n.buffers()], [b for n in stem.norms for b in n.buffers()]
    )
    plain = ConvStem(STEM, backend=backend)
    plain.load_state_dict(stem.state_dict())
    parallel = DistributedDataParallel(torch.compile(plain, fullgraph=True, backend="aot_eager"))
    (parallel(images[mine]) * weights[mine]).sum().backward()
    halves = [stemmed(plain, images[part], weights[part]) for part in (slice(0, 3), slice(3, 6))]
    for parameter, *parts in zip(plain.parameters(), *halves, strict=True):
        torch.testing.assert_close(parameter.grad, sum(parts) / 2, rtol=1e-3, atol=1e-3 * parts[0].abs().max().item())
    try:
        bn_relu(x, *shared, torch.ones(5), torch.ones(5), True, process_group=dist.group.WORLD, backend="torch")
    except BackendUnavailable as error:
        assert "does not share statistics" in str(error)
    else:
        raise AssertionError("torch took a process group")
    try:
        other = create_model("vitc_nano", backend="conv_stem=bn_relu").stem
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(other)(images)
    except BackendUnavailable as error:
        assert "'bn_relu' does not share statistics" in str(error)
    else:
        raise AssertionError("bn_relu took a process group")
    try:
        alone = x[:3] if rank else x[:2]
        bn_relu(alone, *shared, torch.ones(5), torch.ones(5), True, process_group=dist.group.WORLD, backend=backend)
    except RuntimeError as error:
        assert "different numbers of values" in str(error)
    else:
        raise AssertionError("processes of different sizes were taken")


for backend in sys.argv[1:]:
    check(backend)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does_of_the_whole_batch(tmp_path):
    (tmp_path / "compare.py").write_text(_COMPARE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "compare.py"), "reference", "triton"],
        capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
