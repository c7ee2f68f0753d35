"""Vision transformers with an early-convolution stem (Xiao et al. 2021), their fused operators and their training."""

from importlib.metadata import PackageNotFoundError, version

from fastvitc.checkpoint import load_model, save_model
from fastvitc.complexity import Complexity, complexity
from fastvitc.config import StemConfig, ViTConfig, list_models
from fastvitc.encoder import Attention, Block, DropPath, Mlp
from fastvitc.errors import CheckpointError, DataError, FastvitcError, UsageError
from fastvitc.inference import FrozenModel, optimize_for_inference
from fastvitc.model import VisionTransformer, create_model, resize_pos_embed
from fastvitc.stems import ConvStem, PatchifyStem

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
    "create_model",
    "list_models",
    "load_model",
    "optimize_for_inference",
    "resize_pos_embed",
    "save_model",
]
