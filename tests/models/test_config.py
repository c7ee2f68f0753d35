import pytest

from fastvitc import StemConfig, UsageError, ViTConfig, create_model, list_models
from fastvitc.models.config import preset


def test_unknown_model_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"unknown model 'vitc_4g'; did you mean vitc_4gf"):
        create_model("vitc_4g")


def test_a_name_like_no_other_lists_the_models():
    with pytest.raises(UsageError, match="known models: vitp_1gf, vitc_1gf"):
        create_model("0000")


def test_every_model_of_the_paper_and_the_ablation_has_a_preset():
    sizes = [f"{stem}_{size}gf" for size in (1, 4, 18, 36, 72) for stem in ("vitp", "vitc")]
    ablation = [f"vitc_4gf_s{i}" for i in (1, 2, 3, 4)]
    assert set(list_models()) == {*sizes, *ablation, "vitp_nano", "vitc_nano"}


@pytest.mark.parametrize("name", [n for n in list_models() if "nano" not in n])
def test_every_stem_of_the_paper_has_stride_16(name):
    assert preset(name).stem.stride == 16
    assert preset(name).grid == (14, 14)


def test_heads_that_do_not_divide_the_width_are_refused_with_the_nearest():
    with pytest.raises(
        UsageError, match=r"width=96 and heads=5; the nearest number of heads that does is (4|6)"
    ):
        ViTConfig(StemConfig((96,), (8,), (8,)), 96, 288, heads=5, depth=1)


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (0, 32), (7, 7)])
def test_an_image_size_off_the_stride_is_refused_with_the_nearest(size):
    with pytest.raises(
        UsageError, match=r"multiples of the stem's stride 8, got .*; the nearest size that fits is"
    ):
        create_model("vitc_nano", image_size=size)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pool": "max"}, "pool must be"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"num_classes": -1}, "num_classes at least 0"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(change, words):
    with pytest.raises(UsageError, match=words):
        create_model("vitc_nano", **change)


def test_a_stem_of_another_width_is_refused():
    with pytest.raises(UsageError, match="must end in the encoder's width"):
        ViTConfig(StemConfig((96,), (8,), (8,)), 64, 288, heads=4, depth=1)


def test_a_stem_of_uneven_lists_is_refused():
    with pytest.raises(UsageError, match="equally many channels, kernels and strides"):
        StemConfig((8, 8), (3,), (2, 2))
