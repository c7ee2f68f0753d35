from dataclasses import replace

import pytest
import torch

from bench import runtimes, test_models
from bench.contest import Arena
from bench.models import image_batch
from fastvitc.models.config import preset

CPU = torch.device("cpu")
CONFIG = replace(preset("vitc_nano"), depth=1, num_classes=10)


def inference(dtype):
    _, contest = test_models.model_contests("nano", CONFIG, 2, CPU, dtype)
    return contest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "package"), [("OpenVINO", "openvino"), ("ONNX Runtime fp32", "onnxruntime")]
)
def test_an_installed_runtime_gives_the_references_logits(name, package, dtype):
    pytest.importorskip(package)
    _, error = Arena().enter(inference(dtype), name)
    assert error < (1e-5 if "fp32" in name or dtype == torch.float32 else 2e-2)


def test_openvino_computes_in_the_dtype_of_the_contest():
    pytest.importorskip("openvino")
    images = image_batch(CONFIG, 2, CPU)
    wide, narrow = (runtimes.openvino(CONFIG, images, d)(images) for d in (torch.float32, torch.bfloat16))
    assert not torch.equal(wide, narrow)


def test_a_runtime_that_is_not_installed_does_not_contend(monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "openvino" else object())
    assert list(runtimes.runtimes(CPU)) == ["ONNX Runtime fp32"]


def test_a_runtime_with_a_missing_exporter_does_not_contend(monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert list(runtimes.runtimes(CPU)) == ["OpenVINO"]


def test_the_runtimes_contend_on_a_cpu_only():
    assert runtimes.runtimes(torch.device("cuda")) == {}


def test_the_optimised_model_contends_in_inference():
    _, error = Arena().enter(inference(torch.float32), "fastvitc optimized")
    assert error < 1e-5
