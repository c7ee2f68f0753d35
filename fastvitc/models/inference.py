"""A trained model made ready to be applied, and nothing else."""

import copy

import torch
from torch import Tensor, nn

from fastvitc.errors import UsageError
from fastvitc.models.encoder import Block, Mlp
from fastvitc.models.vit import VisionTransformer


class FrozenModel(nn.Module):
    """What `optimize_for_inference` returns; its weights are constants of the compiled code."""

    def __init__(self, model: VisionTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = model.config, dtype
        self._model = model
        self._model.compile(fullgraph=True)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Normalised or uint8 image (B, C, H, W) → logits (B, num_classes) float32, as `VisionTransformer`."""
        import torch._inductor.config  # late: with `import fastvitc` it would slow every program's start

        self._model.check_image(image)
        if image.is_floating_point():
            image = image.to(self.dtype)
        with torch._inductor.config.patch(freezing=True):  # read wherever the call compiles anew
            return self._model(image.contiguous(memory_format=torch.channels_last)).float()

    def train(self, mode: bool = True) -> "FrozenModel":
        if mode:
            raise UsageError(
                "an optimised model cannot be trained: its weights are constants; train the model it was made from"
            )
        return super().train(False)


def optimize_for_inference(model: VisionTransformer, *, dtype: torch.dtype = torch.bfloat16) -> FrozenModel:
    """A copy of a model that only computes logits, as fast as this machine does: compiled, with constant weights.

    BatchNorm is folded into the convolutions, weights are cast and packed once, bias, activation and residual sums are
    part of the products where the compiler has them. The first calls compile, again for a second batch size.

    Args:
        model: a trained model; it is left as it is.
        dtype: of weights and arithmetic; float32 for the exact results, and on a CPU that cannot multiply in bfloat16,
            as it is slower in it.

    Raises:
        UsageError: a dtype that is not floating point.
    """
    if not dtype.is_floating_point:
        raise UsageError(f"dtype must be a floating-point dtype, got {dtype}")
    frozen = copy.deepcopy(model).eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
    # The compiler makes these part of their neighbours, which it cannot with an op of ours.
    for module in frozen.modules():
        if isinstance(module, (Block, Mlp)) and module.backend == "auto":
            module.backend = "torch"
    return FrozenModel(frozen, dtype)
