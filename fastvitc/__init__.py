"""Vision transformers with an early-convolution stem (Xiao et al. 2021), their fused operators and their training."""

from importlib.metadata import PackageNotFoundError, version

from fastvitc import convert
from fastvitc.errors import CheckpointError, DataError, FastvitcError, UsageError
from fastvitc.models.complexity import Complexity, complexity
from fastvitc.models.config import StemConfig, ViTConfig, list_models
from fastvitc.models.encoder import Attention, Block, DropPath, Mlp
from fastvitc.models.inference import FrozenModel, optimize_for_inference
from fastvitc.models.saved import load_model, save_model
from fastvitc.models.stems import ConvStem, PatchifyStem
from fastvitc.models.vit import VisionTransformer, create_model, resize_pos_embed

try:
    __version__ = version("fastvitc")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "Attention",
    "Block",
    "CheckpointError",
    "Complexity",
    "ConvStem",
    "DataError",
    "DropPath",
    "FastvitcError",
    "FrozenModel",
    "Mlp",
    "PatchifyStem",
    "StemConfig",
    "UsageError",
    "ViTConfig",
    "VisionTransformer",
    "complexity",
    "convert",
    "create_model",
    "list_models",
    "load_model",
    "optimize_for_inference",
    "resize_pos_embed",
    "save_model",
]
