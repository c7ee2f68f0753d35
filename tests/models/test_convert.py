"""fastvitc.convert against the real timm and torchvision models, and against pycls written out."""

import argparse
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.peers import timm_model, torchvision_model
from fastvitc import CheckpointError, StemConfig, UsageError, VisionTransformer, ViTConfig, create_model
from fastvitc import convert as cv

CONV = ViTConfig(
    StemConfig((4, 6, 8), (3, 3, 1), (2, 2, 1)), 8, 20, heads=2, depth=2, image_size=(16, 16), num_classes=5
)
PATCHIFY = replace(CONV, stem=StemConfig((8,), (4,), (4,)), depth=3)

ROUTES = {
    "pycls main": (cv.to_pycls, cv.from_pycls),
    "pycls vitconfigs": (lambda state: cv.to_pycls(state, generation="vitconfigs"), cv.from_pycls),
    "torchvision": (cv.to_torchvision, cv.from_torchvision),
    "timm": (cv.to_timm, cv.from_timm),
}
PEERS = {"timm": (timm_model, cv.from_timm), "torchvision": (torchvision_model, cv.from_torchvision)}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic at random, of the scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.dim() > 1:
                tensor.copy_(normal(tensor, tensor[0].numel() ** -0.5))
            else:
                tensor.copy_(1 + normal(tensor, 0.2) if name.endswith("weight") else normal(tensor, 0.2))
    return model


def model_of(config: ViTConfig, seed: int = 0) -> nn.Module:
    return randomise(VisionTransformer(config, backend="reference"), seed).eval()


def state_of(config: ViTConfig) -> dict[str, Tensor]:
    return dict(model_of(config).state_dict())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def image_of(config: ViTConfig, batch: int = 2) -> Tensor:
    return torch.randn(batch, config.in_chans, *config.image_size, generator=torch.Generator().manual_seed(1))


# Round trips


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("config", [CONV, PATCHIFY], ids=["conv", "patchify"])
@pytest.mark.parametrize("num_classes", [5, 0], ids=["head", "no head"])
def test_there_and_back_loses_nothing(route, config, num_classes):
    to, back = ROUTES[route]
    state = state_of(replace(config, num_classes=num_classes))
    assert_same(back(to(state)), state)


@pytest.mark.parametrize("route", ["pycls main", "pycls vitconfigs", "timm"])
@pytest.mark.parametrize("config", [CONV, PATCHIFY], ids=["conv", "patchify"])
def test_there_and_back_loses_nothing_without_a_class_token(route, config):
    to, back = ROUTES[route]
    state = state_of(replace(config, pool="mean"))
    assert_same(back(to(state)), state)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(route, dtype):
    to, back = ROUTES[route]
    state = dict(model_of(CONV).to(dtype).state_dict())
    assert to(state).keys() != state.keys()
    assert {t.dtype for t in to(state).values()} == {dtype, torch.int64}
    assert_same(back(to(state)), state)


@pytest.mark.parametrize("route", ROUTES)
def test_inputs_are_not_modified(route):
    to, back = ROUTES[route]
    state = state_of(CONV)
    before = {key: tensor.clone() for key, tensor in state.items()}
    theirs = to(state)
    theirs_before = {key: tensor.clone() for key, tensor in theirs.items()}
    back(theirs)
    assert_same(state, before)
    assert_same(theirs, theirs_before)


def test_timm_keeps_other_numbers_of_channels():
    state = state_of(replace(CONV, in_chans=5))
    assert_same(cv.from_timm(cv.to_timm(state)), state)


@st.composite
def configs(draw) -> ViTConfig:
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(1, 4))
    hidden = draw(st.lists(st.integers(1, 9), max_size=4))
    if hidden:
        strides = draw(st.lists(st.sampled_from([1, 2]), min_size=len(hidden), max_size=len(hidden)))
        stem = StemConfig((*hidden, width), (3,) * len(hidden) + (1,), (*strides, 1))
    else:
        patch = draw(st.sampled_from([2, 4, 8]))
        stem = StemConfig((width,), (patch,), (patch,))
    return ViTConfig(
        stem,
        width,
        width * draw(st.integers(1, 4)),
        heads=heads,
        depth=draw(st.integers(1, 12)),
        image_size=(stem.stride * draw(st.integers(1, 3)),) * 2,
        num_classes=draw(st.integers(0, 12)),
        pool=draw(st.sampled_from(["token", "mean"])),
    )


@settings(max_examples=40, deadline=None)
@given(configs())
def test_any_architecture_survives_there_and_back(config):
    state = state_of(config)
    for route, (to, back) in ROUTES.items():
        if route != "torchvision" or config.pool == "token":
            assert_same(back(to(state)), state)


@settings(max_examples=20, deadline=None)
@given(configs())
def test_any_architecture_has_the_keys_and_shapes_of_the_real_libraries(config):
    state = state_of(config)
    assert shapes(cv.to_timm(state)) == shapes(timm_model(config).state_dict())
    if config.pool == "token":
        assert shapes(cv.to_torchvision(state)) == shapes(torchvision_model(config).state_dict())


# The real libraries


@pytest.mark.parametrize("library", PEERS)
@pytest.mark.parametrize(
    ("name", "size"), [("vitc_1gf", 64), ("vitp_1gf", 64), ("vitc_1gf", 224), ("vitc_nano", 32)]
)
def test_logits_equal_those_of_the_library(library, name, size):
    build, convert = PEERS[library]
    model = create_model(name, num_classes=10, image_size=size, backend="reference").eval()
    peer = randomise(build(model.config)).eval()
    model.load_state_dict(convert(peer.state_dict()))
    image = image_of(model.config)
    with torch.no_grad():
        expected = peer(image)
        assert expected.std() > 0.1
        torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", PEERS)
@pytest.mark.parametrize("name", ["vitc_1gf", "vitp_1gf"])
def test_training_logits_and_batch_statistics_equal_those_of_the_library(library, name):
    build, convert = PEERS[library]
    model = create_model(name, num_classes=10, image_size=64, backend="reference").train()
    peer = randomise(build(model.config)).train()
    model.load_state_dict(convert(peer.state_dict()))
    image = image_of(model.config, batch=4)
    with torch.no_grad():
        torch.testing.assert_close(model(image), peer(image), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), convert(peer.state_dict()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [CONV, PATCHIFY], ids=["conv", "patchify"])
def test_mean_pooled_logits_equal_those_of_timm(config):
    config = replace(config, pool="mean", image_size=(16, 24))
    model = model_of(config)
    peer = timm_model(config).eval()
    peer.load_state_dict(cv.to_timm(model.state_dict()))
    image = image_of(config)
    torch.testing.assert_close(model(image), peer(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", PEERS)
def test_features_without_a_head_equal_those_of_the_library(library):
    build, convert = PEERS[library]
    config = replace(CONV, num_classes=0)
    model = model_of(config)
    peer = randomise(build(config)).eval()
    model.load_state_dict(convert(peer.state_dict()))
    image = image_of(config)
    torch.testing.assert_close(model(image), peer(image), rtol=1e-5, atol=1e-5)


def test_torchvision_names_before_0_13_are_read():
    state = state_of(CONV)
    old = {
        key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for key, tensor in cv.to_torchvision(state).items()
    }
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in old
    assert_same(cv.from_torchvision(old), state)


def test_timm_peer_drops_paths_at_our_rates():
    peer = timm_model(replace(CONV, depth=3, drop_path=0.2))
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in peer.blocks] == pytest.approx(
        [0, 0.1, 0.2]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": (16, 32)},
        {"in_chans": 4},
        {"pool": "mean"},
        {"drop_path": 0.1},
        {"stem": StemConfig((4, 8), (4, 1), (4, 1))},
        {"stem": StemConfig((4, 8), (3, 2), (2, 2))},
        {"stem": StemConfig((8,), (8,), (4,))},
    ],
    ids=["rectangle", "channels", "mean", "drop path", "even kernel", "wide closing", "overlapping patches"],
)
def test_torchvision_peer_refuses_what_torchvision_cannot_build(changes):
    with pytest.raises(UsageError, match="torchvision's ViT needs square RGB images"):
        torchvision_model(replace(CONV, **changes))


def test_timm_peer_refuses_overlapping_patches():
    with pytest.raises(UsageError, match="overlap"):
        timm_model(replace(PATCHIFY, stem=StemConfig((8,), (8,), (4,))))


@pytest.mark.parametrize("build", [timm_model, torchvision_model])
def test_peers_take_every_kernel_that_both_pad_alike(build):
    config = replace(CONV, stem=StemConfig((4, 6, 8), (3, 2, 1), (2, 2, 1)))
    model, peer = model_of(config), build(config).eval()
    to = cv.to_timm if build is timm_model else cv.to_torchvision
    peer.load_state_dict(to(model.state_dict()))
    image = image_of(config)
    torch.testing.assert_close(model(image), peer(image), rtol=1e-5, atol=1e-5)


# pycls, whose code is not at hand: its keys and its computation written out

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


# State dicts that do not fit


def refusal(convert, state) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(state)
    return str(caught.value)


def test_every_missing_unknown_and_misshaped_key_is_named_at_once():
    theirs = cv.to_torchvision(state_of(CONV))
    del theirs["encoder.ln.bias"], theirs["conv_proj.conv_bn_relu_1.1.running_var"]
    theirs["heads.pre_logits.weight"] = torch.zeros(8, 8)
    theirs["encoder.layers.encoder_layer_1.mlp.3.weight"] = torch.zeros(8, 21)
    theirs["class_token"] = torch.zeros(8)
    assert refusal(cv.from_torchvision, theirs) == (
        "cannot convert from torchvision to fastvitc: "
        "expected the state dict of a ViT_P or ViT_C of torchvision\n"
        "  missing (2): conv_proj.conv_bn_relu_1.1.running_var; encoder.ln.bias\n"
        "  unknown (1): heads.pre_logits.weight\n"
        "  wrong shape (2): class_token: expected (1, 1, 8), found (8); "
        "encoder.layers.encoder_layer_1.mlp.3.weight: expected (8, 20), found (8, 21)\n"
        "  torchvision always has 3 input channels and a class token\n"
        "  only pre-norm blocks with biases, a final LayerNorm and one linear head can be converted; "
        "remove tensors that the model does not use"
    )


@pytest.mark.parametrize("route", ROUTES)
def test_any_single_missing_tensor_is_named(route):
    to, back = ROUTES[route]
    theirs = to(state_of(CONV))
    for missing in theirs.keys() - {"class_token", "cls_token"}:
        message = refusal(back, {key: tensor for key, tensor in theirs.items() if key != missing})
        assert f"missing (1): {missing}\n" in message
        assert "unknown" not in message
        assert "wrong" not in message


@pytest.mark.parametrize("route", ROUTES)
def test_any_single_misshaped_tensor_is_named_with_what_was_found(route):
    to, back = ROUTES[route]
    theirs = to(state_of(CONV))
    for key, tensor in theirs.items():
        message = refusal(back, {**theirs, key: tensor[None]})
        assert f"wrong shape (1): {key}: expected (" in message
        assert f", found ({', '.join(map(str, (1, *tensor.shape)))})\n" in message
        assert "missing" not in message


def test_what_most_tensors_say_is_the_expected_size():
    state = state_of(CONV)
    message = refusal(cv.to_timm, {**state, "stem.convs.0.weight": torch.zeros(9, 3, 3, 3)})
    assert "wrong shape (1): stem.convs.0.weight: expected (4, 3, 3, 3), found (9, 3, 3, 3)" in message


def test_a_missing_block_in_the_middle_is_named():
    state = {key: tensor for key, tensor in state_of(PATCHIFY).items() if "blocks.1." not in key}
    message = refusal(cv.to_timm, state)
    assert "missing (12): blocks.1.norm1.weight" in message
    assert "unknown" not in message


def test_long_lists_are_shortened():
    state = state_of(CONV) | {f"extra_{i}": torch.zeros(1) for i in range(25)}
    message = refusal(cv.to_timm, state)
    assert "unknown (25): extra_0; " in message
    assert "extra_9; and 15 more" in message
    assert "extra_10" not in message


@pytest.mark.parametrize("route", ROUTES)
def test_the_library_that_the_keys_look_like_is_suggested(route):
    theirs = ROUTES[route][0](state_of(CONV))
    wrong = cv.from_timm if "timm" not in route else cv.from_pycls
    message = refusal(wrong, theirs)
    assert f"the keys look like those of {route.split()[0]}: convert from that instead" in message


def test_entries_that_are_no_tensors_are_named():
    message = refusal(cv.to_timm, {**state_of(CONV), "norm.bias": 1.5})
    assert "norm.bias: expected (8), found (float, not a tensor)" in message


@pytest.mark.parametrize("convert", [cv.from_timm, cv.to_timm])
@pytest.mark.parametrize("state", [None, [1], torch.zeros(2), nn.Linear(1, 1)])
def test_what_is_no_state_dict_is_refused(convert, state):
    assert f"expected a state dict, names to tensors, got {type(state).__name__}" in refusal(convert, state)


@pytest.mark.parametrize("convert", [cv.from_pycls, cv.from_timm, cv.from_torchvision, cv.to_pycls])
@pytest.mark.parametrize("state", [{}, {3: torch.zeros(1)}, nn.Linear(2, 2).state_dict()])
def test_foreign_state_dicts_are_refused_without_guessing_a_library(convert, state):
    message = refusal(convert, state)
    assert "missing" in message
    assert "look like" not in message


def test_absurd_indices_are_unknown_keys():
    state = state_of(CONV) | {"blocks.999999999999.norm1.weight": torch.zeros(8)}
    assert "unknown (1): blocks.999999999999.norm1.weight" in refusal(cv.to_timm, state)


def test_torchvision_refuses_models_without_a_class_token():
    message = refusal(cv.to_torchvision, state_of(replace(CONV, pool="mean")))
    assert "missing (1): class_token" in message
    assert "torchvision always has 3 input channels and a class token" in message


@pytest.mark.parametrize("route", ["pycls main", "pycls vitconfigs", "torchvision"])
@pytest.mark.parametrize("config", [CONV, PATCHIFY], ids=["conv", "patchify"])
def test_other_numbers_of_channels_are_refused(route, config):
    message = refusal(ROUTES[route][0], state_of(replace(config, in_chans=4)))
    assert "wrong shape (1)" in message
    assert "3 input channels" in message


# Files


def test_pycls_files_hold_weights_and_their_average(tmp_path):
    state, average = (dict(model_of(CONV, seed).state_dict()) for seed in (1, 2))
    content = {
        "epoch": 3,
        "test_err": 24.7,
        "ema_err": 24.1,
        "model_state": cv.to_pycls(state),
        "ema_state": cv.to_pycls(average),
        "optimizer_state": {"state": {}, "param_groups": []},
        "cfg": "MODEL:\n  TYPE: vit\n",
    }
    path = tmp_path / "model.pyth"
    torch.save(content, path)
    assert_same(cv.load(path, "pycls"), state)
    assert_same(cv.load(str(path), "pycls", ema=True), average)


@pytest.mark.parametrize("source", ["pycls", "torchvision", "timm"])
@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_bare_and_nested_state_dicts_are_found_and_prefixes_dropped(tmp_path, source, entry, prefix):
    state = state_of(PATCHIFY)
    theirs = {prefix + key: tensor for key, tensor in getattr(cv, f"to_{source}")(state).items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 1, entry: theirs} if entry else theirs, path)
    assert_same(cv.load(path, source), state)


@pytest.mark.parametrize("route", ROUTES)
def test_safetensors_files_are_read(tmp_path, route):
    state = state_of(CONV)
    path = tmp_path / "model.safetensors"
    save_file(ROUTES[route][0](state), path)
    assert_same(cv.load(path, route.split()[0]), state)


def test_files_with_the_arguments_of_a_training_script_are_read(tmp_path):
    state = state_of(CONV)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": cv.to_torchvision(state), "args": argparse.Namespace(lr=0.1)}, path)
    assert_same(cv.load(path, "torchvision"), state)


def load_refusal(path, source="timm", **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        cv.load(path, source, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, suffix, kept):
    path = tmp_path / f"model{suffix}"
    theirs = cv.to_timm(state_of(CONV))
    save_file(theirs, path) if suffix == ".safetensors" else torch.save(theirs, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    assert "cannot be read as a checkpoint" in load_refusal(path)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".pth", ".safetensors"]))
def test_foreign_bytes_are_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("foreign") / f"model{suffix}"
    path.write_bytes(content)
    load_refusal(path)


class Malicious:
    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    path = tmp_path / "model.pth"
    torch.save({"model": Malicious()}, path)
    assert "cannot be read as a checkpoint (UnpicklingError" in load_refusal(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_missing_files_and_folders_are_refused(tmp_path, suffix):
    assert "FileNotFoundError" in load_refusal(tmp_path / f"missing{suffix}")
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert "cannot be read as a checkpoint" in load_refusal(folder)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], "text"])
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    assert "expected a state dict" in load_refusal(path)


def test_entries_beside_the_weights_are_passed_over(tmp_path):
    state = state_of(CONV)
    path = tmp_path / "model.pth"
    torch.save({"model": "vit", "state_dict": cv.to_timm(state)}, path)
    assert_same(cv.load(path, "timm"), state)


def test_the_file_is_named_when_its_keys_do_not_fit(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(cv.to_pycls(state_of(CONV)), path)
    assert "the keys look like those of pycls" in load_refusal(path, "timm")


@pytest.mark.parametrize("average", [{}, {"ema_state": None}], ids=["absent", "empty"])
def test_a_pycls_file_without_an_average_says_so(tmp_path, average):
    path = tmp_path / "model.pyth"
    torch.save({"model_state": cv.to_pycls(state_of(CONV)), **average}, path)
    assert "has no weights in ema_state; load it with ema=False" in load_refusal(path, "pycls", ema=True)


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(UsageError, match="pycls, torchvision, timm, got 'keras'"):
        cv.load(tmp_path / "model.pth", "keras")


def test_an_average_is_only_taken_from_pycls(tmp_path):
    with pytest.raises(UsageError, match="needs a pycls checkpoint"):
        cv.load(tmp_path / "model.pth", "timm", ema=True)
