"""The names of the same parts in each library: one table a library. Any two tables make a converter.

Sources: pycls `pycls/models/vit.py`, on `main` and on the paper's branch `vitconfigs`;
`torchvision.models.VisionTransformer`; `timm.models.VisionTransformer`, its conv stem being a `HybridEmbed` around a
`ConvStem`. To add a library, add its table here and a pair of functions beside the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_LEAVES = ("", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Format:
    """What precedes `weight`, `bias` and the like in the keys of each part of a model, {} being its index."""

    library: str
    names: dict[str, str]
    bgr: bool = False
    tokens_first: bool = False  # position embedding (S, 1, d), elsewhere (1, S, d)
    three_channels: bool = False
    needs_class_token: bool = False

    @property
    def always(self) -> str:
        """What its models cannot do without, for the error message."""
        return " and ".join(
            ["3 input channels"] * self.three_channels + ["a class token"] * self.needs_class_token
        )

    def key(self, part: str, index: int, leaf: str) -> str:
        return self.names[part].format(index) + leaf

    def holds(self, state: Mapping[str, Any], part: str, index: int = 0) -> bool:
        """Whether any tensor of the part is there."""
        return any(self.key(part, index, leaf) in state for leaf in _LEAVES)


OURS = Format(
    "fastvitc",
    {
        "stem_conv": "stem.convs.{}.",
        "stem_norm": "stem.norms.{}.",
        "stem_closing": "stem.proj.",
        "patchify": "stem.proj.",
        "class_token": "class_token",
        "pos_embed": "pos_embed",
        "norm1": "blocks.{}.norm1.",
        "qkv": "blocks.{}.attn.qkv.",
        "attn_proj": "blocks.{}.attn.proj.",
        "norm2": "blocks.{}.norm2.",
        "fc1": "blocks.{}.mlp.fc1.",
        "fc2": "blocks.{}.mlp.fc2.",
        "norm": "norm.",
        "head": "head.",
    },
)

TIMM = Format(
    "timm",
    OURS.names
    | {
        "stem_conv": "patch_embed.backbone.{}.conv.",
        "stem_norm": "patch_embed.backbone.{}.bn.",
        "stem_closing": "patch_embed.backbone.{}.conv.",
        "patchify": "patch_embed.proj.",
        "class_token": "cls_token",
    },
)

TORCHVISION = Format(
    "torchvision",
    {
        "stem_conv": "conv_proj.conv_bn_relu_{}.0.",
        "stem_norm": "conv_proj.conv_bn_relu_{}.1.",
        "stem_closing": "conv_proj.conv_last.",
        "patchify": "conv_proj.",
        "class_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "norm1": "encoder.layers.encoder_layer_{}.ln_1.",
        "qkv": "encoder.layers.encoder_layer_{}.self_attention.in_proj_",
        "attn_proj": "encoder.layers.encoder_layer_{}.self_attention.out_proj.",
        "norm2": "encoder.layers.encoder_layer_{}.ln_2.",
        "fc1": "encoder.layers.encoder_layer_{}.mlp.0.",
        "fc2": "encoder.layers.encoder_layer_{}.mlp.3.",
        "norm": "encoder.ln.",
        "head": "heads.head.",
    },
    three_channels=True,
    needs_class_token=True,
)
TORCHVISION_BEFORE_0_13 = replace(
    TORCHVISION,
    names=TORCHVISION.names
    | {
        "fc1": "encoder.layers.encoder_layer_{}.mlp.linear_1.",
        "fc2": "encoder.layers.encoder_layer_{}.mlp.linear_2.",
    },
)

_PYCLS_MAIN = Format(
    "pycls",
    {
        "stem_conv": "stem.cstem{}_conv.",
        "stem_norm": "stem.cstem{}_bn.",
        "stem_closing": "stem.cstem_last_conv.",
        "patchify": "stem.patchify.",
        "class_token": "class_token",
        "pos_embed": "pos_embedding",
        "norm1": "encoder.block_{}.ln_1.",
        "qkv": "encoder.block_{}.self_attention.block.in_proj_",
        "attn_proj": "encoder.block_{}.self_attention.block.out_proj.",
        "norm2": "encoder.block_{}.ln_2.",
        "fc1": "encoder.block_{}.mlp_block.linear_1.",
        "fc2": "encoder.block_{}.mlp_block.linear_2.",
        "norm": "encoder.ln.",
        "head": "head.head_fc.",
    },
    bgr=True,
    tokens_first=True,
    three_channels=True,
)
PYCLS = {
    "main": _PYCLS_MAIN,
    "vitconfigs": replace(
        _PYCLS_MAIN,
        tokens_first=False,
        names=_PYCLS_MAIN.names
        | {
            "qkv": "encoder.block_{}.self_attention.attn_proj.",
            "attn_proj": "encoder.block_{}.self_attention.out_proj.",
        },
    ),
}

ALL = (OURS, TIMM, TORCHVISION, TORCHVISION_BEFORE_0_13, *PYCLS.values())
