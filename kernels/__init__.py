"""Fused operators for vision transformers with an early-convolution stem, each with a plain PyTorch reference."""

from fastvitc.kernels.add_layer_norm import add_layer_norm
from fastvitc.kernels.attention import attention
from fastvitc.kernels.bias_gelu import bias_gelu
from fastvitc.kernels.bn_relu import bn_relu
from fastvitc.kernels.choice.backends import BackendUnavailable, Choice, availability, chosen
from fastvitc.kernels.choice.measured import Measured, measured, record
from fastvitc.kernels.conv_stem import conv_stem
from fastvitc.kernels.conv_stem.arguments import Layers, Pixels

__all__ = [
    "BackendUnavailable",
    "Choice",
    "Layers",
    "Measured",
    "Pixels",
    "add_layer_norm",
    "attention",
    "availability",
    "bias_gelu",
    "bn_relu",
    "chosen",
    "conv_stem",
    "measured",
    "record",
]
