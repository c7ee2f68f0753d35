"""Inference runtimes that a user would export timm's equal model to, where they are installed; for a CPU.

Each gets the same uint8 channels-last images as the other contenders and normalises them itself, in the exported graph,
whose input is (B, H, W, C): so they lie in memory, and nothing is copied.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bench.models import MODELS
from fastvitc.models.config import ViTConfig

#: uint8 images (B, C, H, W) in channels_last memory → logits.
Runner = Callable[[Tensor], Tensor]


class _Exported(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.model = MODELS["timm"](config)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, H, W, C) uint8 → logits."""
        return self.model(pixels.permute(0, 3, 1, 2))


def _pixels(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1)


def openvino(config: ViTConfig, images: Tensor, dtype: torch.dtype) -> Runner:
    """OpenVINO for the shape of `images`, in bfloat16 or float32."""
    import openvino

    pixels = _pixels(images)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"`torch\.jit\.trace", FutureWarning
        )  # what the conversion is made by
        model = openvino.convert_model(
            _Exported(config).eval(), example_input=pixels, input=list(pixels.shape)
        )
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.compile_model(model, "CPU", options)

    def run(images: Tensor) -> Tensor:
        results = compiled(_pixels(images).numpy(), share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    return run


def onnx_runtime(config: ViTConfig, images: Tensor, dtype: torch.dtype) -> Runner:
    """ONNX Runtime for the shape of `images`, in float32 whatever the dtype: it has no bfloat16 kernels for a CPU."""
    import onnxruntime

    exported = torch.onnx.export(_Exported(config).eval(), (_pixels(images),), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # its threads leave the next one alone
    session = onnxruntime.InferenceSession(
        exported.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (name,) = (value.name for value in session.get_inputs())

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: _pixels(images).numpy()})
        return torch.from_numpy(logits)

    return run


_ALL = {
    "OpenVINO": (openvino, ("openvino",)),
    "ONNX Runtime fp32": (onnx_runtime, ("onnx", "onnxruntime", "onnxscript")),
}
#: The packages behind them, whose versions a result depends on.
PACKAGES = ("openvino", "onnxruntime")


def runtimes(device: torch.device) -> dict[str, Callable[[ViTConfig, Tensor, torch.dtype], Runner]]:
    """Name → what makes a runner for a configuration, images and a dtype; of what runs on the device here."""
    if device.type != "cpu":
        return {}
    return {name: build for name, (build, needs) in _ALL.items() if all(map(find_spec, needs))}
