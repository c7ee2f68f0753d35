import copy
import math

import pytest
import torch
from torch import nn

from fastvitc import (
    Attention,
    Block,
    ConvStem,
    Mlp,
    PatchifyStem,
    create_model,
    list_models,
    resize_pos_embed,
)
from fastvitc.errors import UsageError
from fastvitc.models.config import preset
from fastvitc.models.stems import IMAGENET_MEAN, IMAGENET_STD


def randomised(model):
    """The model with every parameter and statistic random, so that no initial zero hides a mistake."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn_like(tensor)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else 0.2 * noise)
    return model


def plain_forward(model, image):
    """The model spelled out in torch.nn.functional."""
    x = image
    for conv, norm in zip(model.stem.convs, model.stem.norms, strict=True):
        x = torch.relu(norm(conv(x)))
    x = model.stem.proj(x).flatten(2).mT
    if model.class_token is not None:
        x = torch.cat([model.class_token.expand(len(x), -1, -1), x], 1)
    x = x + model.pos_embed
    for block in model.blocks:
        mha = nn.MultiheadAttention(x.shape[-1], block.attn.heads, batch_first=True)
        mha.in_proj_weight, mha.in_proj_bias = block.attn.qkv.weight, block.attn.qkv.bias
        mha.out_proj = block.attn.proj
        y = block.norm1(x)
        x = x + mha(y, y, y, need_weights=False)[0]
        x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
    x = model.norm(x)
    return model.head(x[:, 0] if model.class_token is not None else x.mean(1))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["vitc_nano", "vitp_nano"])
def test_logits_equal_the_plain_forward(name, backend, pool, training):
    model = randomised(create_model(name, num_classes=7, pool=pool, backend=backend)).train(training)
    image = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(image), plain_forward(model, image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_and_running_statistics_equal_the_plain_forward(backend):
    image = torch.randn(3, 3, 32, 32)
    results = []
    for forward in (lambda m: m(image), lambda m: plain_forward(m, image)):
        torch.manual_seed(1)
        model = randomised(create_model("vitc_nano", num_classes=7, backend=backend))
        forward(model).square().sum().backward()
        results.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    for ours, plain in zip(*results, strict=True):
        assert ours.keys() == plain.keys()
        for key in ours:
            scale = plain[key].abs().max().clamp(min=1)
            torch.testing.assert_close(ours[key] / scale, plain[key] / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (40, 24), (16, 64)])
@pytest.mark.parametrize("name", ["vitc_nano", "vitp_nano"])
def test_any_multiple_of_the_stride_is_an_image_size(name, size):
    model = create_model(name, num_classes=3, image_size=size, in_chans=1)
    assert model(torch.randn(2, 1, *size)).shape == (2, 3)


@pytest.mark.parametrize("name", [n for n in list_models() if n.startswith("vitc_4gf") or n == "vitc_18gf"])
def test_every_stem_gives_one_token_per_16_pixels(name):
    stem = ConvStem(preset(name).stem)
    assert stem(torch.randn(2, 3, 32, 48)).shape == (2, 6, preset(name).width)


def test_another_image_size_than_the_models_is_refused():
    model = create_model("vitc_nano")
    with pytest.raises(ValueError, match=r"takes images \(B, 3, 32, 32\), got \(1, 3, 40, 32\)"):
        model(torch.zeros(1, 3, 40, 32))


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_images_of_another_size_are_taken_with_interpolated_positions(pool):
    model = randomised(create_model("vitc_nano", num_classes=3, pool=pool)).eval()
    other = create_model("vitc_nano", num_classes=3, pool=pool, image_size=(16, 40)).eval()
    positions = resize_pos_embed(model.pos_embed, (4, 4), (2, 5), int(pool == "token"))
    other.load_state_dict({**model.state_dict(), "pos_embed": positions})
    image = torch.randn(2, 3, 16, 40)
    model.image_size = (16, 40)
    torch.testing.assert_close(model(image), other(image))
    model(image).sum().backward()
    assert model.pos_embed.grad.abs().min() > 0


@pytest.mark.parametrize(("pool", "kept"), [("token", 1 + 4), ("mean", 4)])
def test_training_leaves_out_patches_and_keeps_the_class_token(pool, kept, monkeypatch):
    model = randomised(create_model("vitc_nano", num_classes=3, pool=pool))
    model.patch_drop = 0.75
    image, (block, *_) = torch.randn(2, 3, 32, 32), model.blocks
    tokens = model.stem(image, model.class_token, model.pos_embed)
    seen = []
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for training in (True, True, False):
        model.train(training)(image)
    first, second, whole = seen
    assert first.shape[1] == second.shape[1] == kept
    assert whole.shape[1] == tokens.shape[1]
    for part in (first, second):
        distance = torch.cdist(part, tokens)
        assert (distance.min(2).values < 1e-3).all()
        assert all(len(places.unique()) == kept for places in distance.argmin(2))
    assert not torch.allclose(first, second)
    if pool == "token":
        torch.testing.assert_close(first[:, 0], tokens[:, 0])


def test_no_classes_gives_pooled_features():
    model = create_model("vitc_nano", num_classes=0).eval()
    image = torch.randn(2, 3, 32, 32)
    features = model.forward_features(image)
    assert features.shape == (2, 17, 96)
    torch.testing.assert_close(model(image), features[:, 0])


def test_grad_checkpointing_changes_no_gradient():
    image, grads = torch.randn(2, 3, 32, 32), []
    for grad_checkpointing in (False, True):
        torch.manual_seed(1)
        model = randomised(create_model("vitc_nano", drop_path=0.3, grad_checkpointing=grad_checkpointing))
        torch.manual_seed(2)
        model(image).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_blocks_that_drop_at_different_rates_share_one_graph():
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for rate in (0.1, 0.2, 0.3):
        block = Block(16, 2, 32, drop_path=rate)
        block.compile(fullgraph=True, dynamic=False, backend="eager")
        block(torch.ones(2, 3, 16))
    assert graphs["unique_graphs"] == before + 1


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean():
    block = Block(16, 2, 32, drop_path=0.5)
    branch = block.drop_path(torch.ones(4000, 3, 16))
    per_sample = branch.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == 2).all(1)).all()
    assert abs(branch.mean().item() - 1) < 0.1
    assert torch.equal(block.eval().drop_path(branch), branch)


def test_drop_path_rises_linearly_with_depth():
    model = create_model("vitc_nano", drop_path=0.2)
    rates = [block.drop_path.rate for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def assert_normal(tensor, std):
    assert abs(tensor.mean().item()) < 5 * std / math.sqrt(tensor.numel())
    assert tensor.std().item() == pytest.approx(std, rel=5 / math.sqrt(tensor.numel()))


def test_initialisation_is_the_papers():
    model = create_model("vitc_1gf")
    for conv in model.stem.convs:
        assert_normal(conv.weight, math.sqrt(2 / conv.out_channels))
        assert conv.bias is None
    assert_normal(model.stem.proj.weight, math.sqrt(1 / 192))
    assert_normal(model.pos_embed, 0.02)
    xavier = math.sqrt(6 / (192 + 3 * 192))
    block = model.blocks[3]
    assert block.attn.qkv.weight.abs().max() <= xavier
    assert_normal(block.attn.qkv.weight, xavier / math.sqrt(3))
    assert block.attn.proj.weight.abs().max() <= 1 / math.sqrt(192)
    assert_normal(block.attn.proj.weight, 1 / math.sqrt(3 * 192))
    assert_normal(block.mlp.fc1.weight, math.sqrt(2 / (192 + 576)))
    assert_normal(block.mlp.fc2.bias, 1e-6)
    zeros = [model.class_token, model.head.weight, model.head.bias, model.stem.proj.bias]
    zeros += [block.attn.qkv.bias, block.attn.proj.bias]
    assert all(not tensor.any() for tensor in zeros)
    assert (model.norm.eps, model.stem.norms[0].eps, model.stem.norms[0].momentum) == (1e-6, 1e-5, 0.1)


def test_a_drawn_head_changes_the_head_alone():
    models = []
    for init in ("paper", "drawn_head"):
        torch.manual_seed(3)
        models.append(create_model("vitc_1gf", init=init).state_dict())
    paper, drawn = models
    assert [key for key in paper if not torch.equal(paper[key], drawn[key])] == ["head.weight"]
    assert_normal(drawn["head.weight"], 0.02)


def test_an_unknown_init_is_refused():
    with pytest.raises(UsageError, match="no init 'timm'; choose among paper, drawn_head"):
        create_model("vitc_nano", init="timm")


def test_the_patchify_stem_starts_truncated_at_two_deviations_of_its_fan_in():
    stem = PatchifyStem(preset("vitp_4gf").stem)
    std = math.sqrt(1 / (3 * 16 * 16))
    assert stem.proj.weight.abs().max() <= 2.0
    assert_normal(stem.proj.weight, std)
    assert not stem.proj.bias.any()


def test_weights_of_another_size_load_with_interpolated_positions():
    small = randomised(create_model("vitc_nano", image_size=32))
    large = create_model("vitc_nano", image_size=(48, 64))
    large.load_state_dict(small.state_dict())
    assert torch.equal(large.pos_embed[:, 0], small.pos_embed[:, 0])
    back = resize_pos_embed(large.pos_embed, (6, 8), (4, 4))
    assert (back - small.pos_embed).abs().max() < 0.5 * small.pos_embed.abs().max()


def test_interpolation_keeps_a_smooth_embedding():
    rows = torch.linspace(-1, 1, 8).view(-1, 1).expand(8, 8).reshape(1, 64, 1)
    embed = torch.cat([torch.zeros(1, 1, 1), rows], 1)
    resized = resize_pos_embed(embed, (8, 8), (16, 16))[0, 1:].view(16, 16)
    assert (resized.diff(dim=0)[4:11] > 0).all()
    assert resized.diff(dim=1).abs().max() < 1e-6


def test_a_grid_that_does_not_fit_the_embedding_is_refused():
    with pytest.raises(ValueError, match=r"pos_embed must be \(1, 1 \+ 3·4, C\)"):
        resize_pos_embed(torch.zeros(1, 17, 8), (3, 4), (4, 4))


def test_modules_work_outside_the_model():
    x = torch.randn(2, 5, 24)
    assert Attention(24, 3)(x).shape == Mlp(24, 48)(x).shape == Block(24, 3, 48)(x).shape == x.shape


def test_frozen_norms_keep_their_statistics_in_training():
    model = randomised(create_model("vitc_nano", num_classes=3)).train()
    model.stem.norms.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    image = torch.randn(2, 3, 32, 32)
    frozen = model(image)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    torch.testing.assert_close(frozen, model.eval()(image))


def test_norms_that_differ_in_their_settings_are_refused():
    model = create_model("vitc_nano")
    model.stem.norms[1].eps = 1.0
    with pytest.raises(ValueError, match="norms must share"):
        model(torch.zeros(2, 3, 32, 32))


def test_sync_batch_norm_alone_is_batch_norm():
    model = create_model("vitc_nano", num_classes=3)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(synchronized(image), model(image))
    assert torch.equal(synchronized.stem.norms[0].running_var, model.stem.norms[0].running_var)


def test_norms_of_two_types_are_refused():
    model = create_model("vitc_nano")
    model.stem.norms[0] = nn.SyncBatchNorm(model.stem.norms[0].num_features)
    with pytest.raises(ValueError, match=r"their type.*SyncBatchNorm"):
        model(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("training", [True, False])
def test_a_uint8_image_is_normalised_by_the_stem(training):
    model = randomised(create_model("vitc_nano", num_classes=3)).train(training)
    image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(model(image), model((image / 255 - mean) / std), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vitc_nano", "vitp_nano"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_mix_mixes_the_pixels_and_nothing_else(name, dtype):
    model = randomised(create_model(name, num_classes=3))
    image = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    normal = (image / 255 - mean) / std
    expected = normal.clone()
    expected[:, :, 4:20, 8:] = 0.3 * normal[:, :, 4:20, 8:] + 0.7 * normal.roll(1, 0)[:, :, 4:20, 8:]
    found = model(image if dtype == torch.uint8 else normal, torch.tensor([0.3, 4, 20, 8, 32]))
    torch.testing.assert_close(found, model(expected), rtol=1e-4, atol=1e-5)


def test_a_uint8_image_of_other_channels_is_refused():
    model = create_model("vitc_nano", in_chans=4)
    with pytest.raises(TypeError, match="uint8 without them"):
        model(torch.zeros(2, 4, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ({"in_chans": 1}, [0.449], [0.226]),
        ({"in_chans": 1, "mean": (0.1,), "std": (0.2,)}, [0.1], [0.2]),
        ({"mean": (0.1, 0.2, 0.3)}, [0.1, 0.2, 0.3], [0.229, 0.224, 0.225]),
    ],
)
def test_a_uint8_image_is_normalised_with_the_models_means_and_deviations(given, mean, std):
    torch.manual_seed(0)
    model = randomised(create_model("vitc_nano", num_classes=5, **given)).eval()
    image = torch.randint(256, (2, len(mean), 32, 32), dtype=torch.uint8)
    means, deviations = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    torch.testing.assert_close(model(image), model((image / 255 - means) / deviations), rtol=1e-3, atol=1e-3)


def test_means_without_one_for_each_channel_are_refused():
    with pytest.raises(UsageError, match="a number for each of the 3 channels"):
        create_model("vitc_nano", mean=(0.5,))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_model_compiles_as_one_graph_and_agrees_with_eager(backend):
    torch.manual_seed(3)
    model = randomised(create_model("vitc_nano", num_classes=5, backend=backend))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image = torch.randn(2, 3, 32, 32)
    grads = []
    for call in (model, compiled):
        model.zero_grad()
        call(image).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for eager, graph in zip(*grads, strict=True):
        torch.testing.assert_close(eager, graph, rtol=1e-4, atol=1e-4)


def test_a_frozen_stem_keeps_weights_and_statistics_in_training():
    model = create_model("vitc_nano", num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    model.stem.freeze()
    before = {name: value.clone() for name, value in model.stem.state_dict().items()}
    model.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in model.stem.parameters())
    assert model.class_token.grad.abs().sum() > 0
    torch.testing.assert_close(dict(model.stem.state_dict()), before, rtol=0, atol=0)
    assert model.blocks.training
