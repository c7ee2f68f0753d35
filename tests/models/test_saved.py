import json
import os
from dataclasses import replace

import pytest
import torch
from messages import one_line_of

from fastvitc import StemConfig, VisionTransformer, create_model, resize_pos_embed
from fastvitc.models.config import preset
from fastvitc.models.saved import (
    CONFIG,
    WEIGHTS,
    begin_with,
    load_model,
    load_weights,
    read_config,
    save_model,
)
from fastvitc.models.stems import STEMS


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def random_model(name="vitc_nano", **options):
    model = create_model(name, num_classes=3, **options)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 5
    return model


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "model", random_model())
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vitc_nano", {}),
        ("vitp_nano", {}),
        ("vitc_nano", {"image_size": (16, 64), "drop_path": 0.1, "in_chans": 1}),
        ("vitc_nano", {"pool": "mean"}),
    ],
)
def test_a_model_comes_back_bit_for_bit(name, options, tmp_path):
    model = random_model(name, **options)
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert_equal(loaded.state_dict(), model.state_dict())
    assert not loaded.training


def test_a_channels_last_model_comes_back_bit_for_bit(tmp_path):
    model = random_model().to(memory_format=torch.channels_last)
    save_model(tmp_path, model)
    assert_equal(load_model(tmp_path).state_dict(), model.state_dict())


def test_the_weights_file_may_be_named_instead_of_its_folder(saved):
    assert_equal(load_model(saved / WEIGHTS).state_dict(), load_model(str(saved)).state_dict())


def test_the_configuration_is_json_with_the_notes(tmp_path):
    save_model(tmp_path, random_model(), classes=["cat", "dög"], epoch=4)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config == read_config(tmp_path)
    assert (config["classes"], config["epoch"]) == (["cat", "dög"], 4)
    assert config["model"]["stem"]["channels"] == [24, 48, 96, 96]
    assert config["model"]["stem_type"] == "conv"


def test_written_files_follow_the_umask(saved):
    umask = os.umask(0)
    os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in saved.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_damaged_weights_are_refused(keep, saved):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:keep])
    assert "does not hold a whole saved model" in one_line_of(load_model, saved)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(name, saved):
    (saved / name).unlink()
    assert name in one_line_of(load_model, saved)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "\x00\xff",
        '{"architectures": ["ViTModel"]}',
        '{"model": null}',
        '{"model": "vit"}',
        '{"model": {}}',
        '{"model": {"stem": "conv"}}',
        '{"model": {"stem": {"channels": 3}}}',
    ],
)
def test_a_foreign_configuration_is_refused(config, saved):
    (saved / CONFIG).write_text(config)
    assert str(saved) in one_line_of(load_model, saved)


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("heads", 5, "heads must divide width"),
        ("heads", 0, "does not hold a whole saved model"),
        ("image_size", [30, 32], "multiples of the stem's stride"),
        ("image_size", [32], "does not hold a whole saved model"),
        ("colour", "blue", "colour"),
        ("depth", 4, "Unexpected key"),
        ("depth", 6, "Missing key"),
        ("num_classes", 10, "size mismatch for head.weight"),
        ("mlp_width", -288, "does not hold a whole saved model"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(entry, value, words, saved):
    config = read_config(saved)
    config["model"][entry] = value
    (saved / CONFIG).write_text(json.dumps(config))
    assert words in one_line_of(load_model, saved)


def test_weights_of_another_model_are_refused_in_a_line_of_bearable_length():
    weights = random_model("vitp_nano").state_dict()
    message = one_line_of(load_weights, create_model("vitc_nano"), weights)
    assert "these weights do not fit the model" in message
    assert len(message) < 700


def test_another_kind_of_stem_comes_back_as_itself(tmp_path, monkeypatch):
    class OtherStem(StemConfig):
        """A stem of somebody else's."""

    monkeypatch.setitem(STEMS, "other", OtherStem)
    config = preset("vitc_nano")
    stem = OtherStem(config.stem.channels, config.stem.kernels, config.stem.strides)
    model = VisionTransformer(replace(config, stem=stem))
    save_model(tmp_path, model)
    assert type(load_model(tmp_path).config.stem) is OtherStem
    (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text().replace('"other"', '"unheard-of"'))
    assert "unheard-of" in one_line_of(load_model, tmp_path)


def test_a_saved_model_loads_for_other_classes_and_another_size(tmp_path):
    model = random_model(image_size=(32, 48))
    save_model(tmp_path, model)
    other = load_model(tmp_path, num_classes=5, image_size=(40, 64))
    assert (other.config.num_classes, other.config.image_size) == (5, (40, 64))
    assert other.head.weight.abs().sum() == 0
    resized = resize_pos_embed(model.pos_embed, model.config.grid, other.config.grid)
    assert torch.equal(other.pos_embed, resized)
    assert torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    features = load_model(tmp_path, num_classes=0)
    image = torch.randn(1, 3, 32, 48)
    assert torch.equal(features(image), model.eval().forward_features(image)[:, 0])


def test_a_model_that_averages_tokens_begins_with_the_weights_of_one_with_a_class_token():
    given = random_model()
    model = create_model("vitc_nano", num_classes=3, pool="mean")
    assert not begin_with(model, given.state_dict())
    assert torch.equal(model.pos_embed, given.pos_embed[:, 1:])
    assert torch.equal(model.head.weight, given.head.weight)
