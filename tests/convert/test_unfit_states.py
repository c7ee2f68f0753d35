"""State dicts that do not fit are refused with all that is wrong with them."""

from dataclasses import replace

import pytest
import torch
from converting import CONV, PATCHIFY, ROUTES, refusal, state_of
from torch import nn

from fastvitc import convert as cv


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
