"""Fused operators for vision transformers with an early-convolution stem, each with a plain PyTorch reference."""

from fastvitc.kernels.add_layer_norm import add_layer_norm
from fastvitc.kernels.attention import attention
from fastvitc.kernels.bias_gelu import bias_gelu
from fastvitc.kernels.bn_relu import bn_relu
from fastvitc.kernels.choice.backends import (
    BackendUnavailable,
    Choice,
    availability,
    candidates,
    chosen,
    requested,
    resolve,
)
from fastvitc.kernels.choice.measured import Measured, cpu_name, measured, record
from fastvitc.kernels.conv_stem import conv_stem
from fastvitc.kernels.conv_stem.arguments import Layers, Pixels
from fastvitc.kernels.cpu.build import cpu_flags

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
    "candidates",
    "chosen",
    "conv_stem",
    "cpu_flags",
    "cpu_name",
    "measured",
    "record",
    "requested",
    "resolve",
]
