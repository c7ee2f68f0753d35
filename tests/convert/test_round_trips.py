from dataclasses import replace

import pytest
import torch
from converting import CONV, PATCHIFY, ROUTES, assert_same, model_of, shapes, state_of
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.peers import timm_model, torchvision_model
from fastvitc import StemConfig, ViTConfig
from fastvitc import convert as cv


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
