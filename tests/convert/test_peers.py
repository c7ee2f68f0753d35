"""fastvitc.convert against the real timm and torchvision models."""

from dataclasses import replace

import pytest
import torch
from converting import CONV, PATCHIFY, PEERS, assert_same, image_of, model_of, randomise, state_of

from bench.peers import timm_model, torchvision_model
from fastvitc import StemConfig, UsageError, create_model
from fastvitc import convert as cv


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
