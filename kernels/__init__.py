"""Fused operators for vision transformers with an early-convolution stem, each with a plain PyTorch reference."""

from fastvitc.kernels._backend import (
    BackendUnavailable,
    Choice,
    availability,
    candidates,
    chosen,
    requested,
    resolve,
)
from fastvitc.kernels._choices import Measured, cpu_name, measured, record
from fastvitc.kernels._native import cpu_flags
from fastvitc.kernels.add_layer_norm import add_layer_norm
from fastvitc.kernels.attention import attention
from fastvitc.kernels.bias_gelu import bias_gelu
from fastvitc.kernels.bn_relu import bn_relu
from fastvitc.kernels.conv_stem import conv_stem

__all__ = [
    "BackendUnavailable",
    "Choice",
    "Measured",
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
