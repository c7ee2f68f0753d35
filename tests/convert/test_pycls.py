"""fastvitc.convert against pycls, whose code is not at hand: its keys and its computation written out."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from converting import CONV, PATCHIFY, image_of, model_of, shapes, state_of
from torch import Tensor

from fastvitc import StemConfig, UsageError, ViTConfig
from fastvitc import convert as cv

TINY = ViTConfig(
    StemConfig((4, 6, 8), (3, 3, 1), (2, 2, 1)), 8, 20, heads=2, depth=1, image_size=(16, 16), num_classes=5
)
TINY_PYCLS_COMMON = {
    "stem.cstem0_conv.weight": (4, 3, 3, 3),
    "stem.cstem0_bn.weight": (4,),
    "stem.cstem0_bn.bias": (4,),
    "stem.cstem0_bn.running_mean": (4,),
    "stem.cstem0_bn.running_var": (4,),
    "stem.cstem0_bn.num_batches_tracked": (),
    "stem.cstem1_conv.weight": (6, 4, 3, 3),
    "stem.cstem1_bn.weight": (6,),
    "stem.cstem1_bn.bias": (6,),
    "stem.cstem1_bn.running_mean": (6,),
    "stem.cstem1_bn.running_var": (6,),
    "stem.cstem1_bn.num_batches_tracked": (),
    "stem.cstem_last_conv.weight": (8, 6, 1, 1),
    "stem.cstem_last_conv.bias": (8,),
    "class_token": (1, 1, 8),
    "encoder.block_0.ln_1.weight": (8,),
    "encoder.block_0.ln_1.bias": (8,),
    "encoder.block_0.ln_2.weight": (8,),
    "encoder.block_0.ln_2.bias": (8,),
    "encoder.block_0.mlp_block.linear_1.weight": (20, 8),
    "encoder.block_0.mlp_block.linear_1.bias": (20,),
    "encoder.block_0.mlp_block.linear_2.weight": (8, 20),
    "encoder.block_0.mlp_block.linear_2.bias": (8,),
    "encoder.ln.weight": (8,),
    "encoder.ln.bias": (8,),
    "head.head_fc.weight": (5, 8),
    "head.head_fc.bias": (5,),
}
TINY_PYCLS = {
    "main": TINY_PYCLS_COMMON
    | {
        "pos_embedding": (17, 1, 8),
        "encoder.block_0.self_attention.block.in_proj_weight": (24, 8),
        "encoder.block_0.self_attention.block.in_proj_bias": (24,),
        "encoder.block_0.self_attention.block.out_proj.weight": (8, 8),
        "encoder.block_0.self_attention.block.out_proj.bias": (8,),
    },
    "vitconfigs": TINY_PYCLS_COMMON
    | {
        "pos_embedding": (1, 17, 8),
        "encoder.block_0.self_attention.attn_proj.weight": (24, 8),
        "encoder.block_0.self_attention.attn_proj.bias": (24,),
        "encoder.block_0.self_attention.out_proj.weight": (8, 8),
        "encoder.block_0.self_attention.out_proj.bias": (8,),
    },
}


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def layer_norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)


def pycls_stem(p: dict[str, Tensor], image: Tensor, strides: tuple[int, ...]) -> Tensor:
    if "stem.patchify.weight" in p:
        weight = p["stem.patchify.weight"]
        return F.conv2d(image, weight, p["stem.patchify.bias"], stride=weight.shape[-1])
    for i, stride in enumerate(strides[:-1]):
        image = F.conv2d(image, p[f"stem.cstem{i}_conv.weight"], stride=stride, padding=1)
        bn = {
            leaf: p[f"stem.cstem{i}_bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        }
        image = F.relu(F.batch_norm(image, **bn, eps=1e-5))
    return F.conv2d(image, p["stem.cstem_last_conv.weight"], p["stem.cstem_last_conv.bias"])


def pycls_attention_main(p: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """x (S, B, d), PyTorch's own multi-head attention."""
    q_k_v = [p[f"{name}.block.in_proj_weight"], p[f"{name}.block.in_proj_bias"]]
    out = [p[f"{name}.block.out_proj.weight"], p[f"{name}.block.out_proj.bias"]]
    y, _ = F.multi_head_attention_forward(
        x, x, x, x.shape[-1], heads, *q_k_v, None, None, False, 0.0, *out, training=False, need_weights=False
    )
    return y


def pycls_attention_vitconfigs(p: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """x (S, B, d), softmax written out."""
    q, k, v = (
        part.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for part in linear(p, f"{name}.attn_proj", x).chunk(3, dim=-1)
    )
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return linear(p, f"{name}.out_proj", (weights @ v).permute(2, 0, 1, 3).flatten(2))


def pycls_forward(p: dict[str, Tensor], bgr: Tensor, config: ViTConfig, generation: str) -> Tensor:
    attention = {"main": pycls_attention_main, "vitconfigs": pycls_attention_vitconfigs}[generation]
    x = pycls_stem(p, bgr, config.stem.strides).flatten(2).permute(2, 0, 1)
    if "class_token" in p:
        x = torch.cat([p["class_token"].expand(1, x.shape[1], -1), x])
    x = x + (p["pos_embedding"] if generation == "main" else p["pos_embedding"].transpose(0, 1))
    for j in range(config.depth):
        block = f"encoder.block_{j}"
        x = x + attention(p, f"{block}.self_attention", layer_norm(p, f"{block}.ln_1", x), config.heads)
        hidden = linear(p, f"{block}.mlp_block.linear_1", layer_norm(p, f"{block}.ln_2", x))
        x = x + linear(p, f"{block}.mlp_block.linear_2", F.gelu(hidden))
    x = layer_norm(p, "encoder.ln", x)
    return linear(p, "head.head_fc", x[0] if "class_token" in p else x.mean(0))


@pytest.mark.parametrize("generation", TINY_PYCLS)
def test_keys_and_shapes_are_those_of_pycls(generation):
    assert shapes(cv.to_pycls(state_of(TINY), generation=generation)) == TINY_PYCLS[generation]


@pytest.mark.parametrize("generation", TINY_PYCLS)
def test_keys_and_shapes_of_pycls_make_our_model(generation):
    theirs = {key: torch.randn(shape) for key, shape in TINY_PYCLS[generation].items()}
    assert shapes(cv.from_pycls(theirs)) == shapes(state_of(TINY))


def test_patchify_stem_and_mean_pooling_have_the_names_of_pycls():
    theirs = cv.to_pycls(state_of(replace(PATCHIFY, pool="mean")))
    assert {key for key in theirs if not key.startswith(("encoder.", "head."))} == {
        "stem.patchify.weight",
        "stem.patchify.bias",
        "pos_embedding",
    }


@pytest.mark.parametrize("generation", TINY_PYCLS)
@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("config", [CONV, PATCHIFY], ids=["conv", "patchify"])
def test_logits_equal_those_of_pycls_on_bgr_images(generation, pool, config):
    config = replace(config, pool=pool)
    model = model_of(config)
    theirs = cv.to_pycls(model.state_dict(), generation=generation)
    rgb = image_of(config)
    expected = pycls_forward(theirs, rgb.flip(1), config, generation)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(rgb), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_generation_of_pycls_is_refused():
    with pytest.raises(UsageError, match="main, vitconfigs, got 'dev'"):
        cv.to_pycls(state_of(CONV), generation="dev")
