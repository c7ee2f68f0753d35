"""Fused operators for vision transformers with an early-convolution stem, each with a plain PyTorch reference."""

from fastvitc.kernels._backend import BackendUnavailable, availability, chosen
from fastvitc.kernels.attention import attention
from fastvitc.kernels.bn_relu import bn_relu
from fastvitc.kernels.conv_stem import conv_stem

__all__ = ["BackendUnavailable", "attention", "availability", "bn_relu", "chosen", "conv_stem"]
