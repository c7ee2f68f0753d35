import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastvitc import VisionTransformer, list_models
from fastvitc.errors import UsageError
from fastvitc.models.config import preset
from fastvitc.training.optim import (
    ModelEma,
    create_optimizers,
    paper_ema_rate,
    parameter_groups,
    set_rates,
)
from fastvitc.training.schedule import Schedule

PAPER = Schedule(epochs=100, warmup_epochs=5.0)


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("name", list_models())
def test_exactly_biases_and_norms_are_not_decayed(name, pool):
    with torch.device("meta"):
        model = VisionTransformer(replace(preset(name), pool=pool))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    exempt = {p for norm in norms for p in norm.parameters()}
    exempt |= {m.bias for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None}
    decayed_group, exempt_group = parameter_groups(model, 0.24)
    assert set(exempt_group["params"]) == exempt
    assert set(decayed_group["params"]) == set(model.parameters()) - exempt
    assert (decayed_group["weight_decay"], exempt_group["weight_decay"]) == (0.24, 0.0)


def test_class_token_and_position_embedding_are_decayed():
    with torch.device("meta"):
        model = VisionTransformer(preset("vitc_1gf"))
    decayed = set(parameter_groups(model, 0.24)[0]["params"])
    assert {model.class_token, model.pos_embed} <= decayed


def test_no_parameter_is_in_two_groups():
    with torch.device("meta"):
        model = VisionTransformer(preset("vitc_1gf"))
    grouped = [p for group in parameter_groups(model, 0.24) for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 1e-4),  # the full rate times the warm-up's 0.1
        (2.5, 5.4915650e-4),  # 1e-3 · (0.005 + 0.995 · 0.99845867) · 0.55
        (5, 9.9387495e-4),  # 1e-3 · (0.005 + 0.995 · 0.99384417), warm-up over
        (50, 5.025e-4),  # half the way between 1e-3 and 5e-6
        (100, 5e-6),
        (120, 5e-6),
    ],
)
def test_the_schedule_follows_the_papers_rule(epoch, rate):
    assert 1e-3 * PAPER.at(epoch) == pytest.approx(rate, rel=1e-6)


def test_the_schedule_rises_in_warmup_and_falls_after_it():
    rates = [PAPER.at(step / 20) for step in range(2001)]
    assert all(a < b for a, b in pairwise(rates[:101]))
    assert all(a > b for a, b in pairwise(rates[100:]))


def test_no_warmup_starts_at_the_peak():
    assert Schedule(epochs=10, warmup_epochs=0).at(0) == pytest.approx(1.0)


def test_every_group_of_every_optimiser_gets_its_share_of_its_own_highest_rate():
    first, second = (create_optimizers(nn.Linear(3, 2), "adamw", lr=lr, weight_decay=0.1) for lr in (1, 4))
    optimizers = [*first, *second]
    for share in (1.0, 0.25):
        set_rates(optimizers, share)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == [share, share, 4 * share, 4 * share]


def test_a_restored_optimiser_keeps_the_highest_rate_of_its_groups():
    (saved,) = create_optimizers(nn.Linear(3, 2), "adamw", lr=0.5, weight_decay=0.1)
    set_rates([saved], 0.1)
    (restored,) = create_optimizers(nn.Linear(3, 2), "adamw", lr=0.5, weight_decay=0.1)
    restored.load_state_dict(saved.state_dict())
    set_rates([restored], 1.0)
    assert [group["lr"] for group in restored.param_groups] == [0.5, 0.5]


def adamw_by_hand(p, grads, lr, decay):
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        direction = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        p = p - lr * decay * p - lr * direction
    return p


def sgd_by_hand(p, grads, lr, decay):
    velocity = torch.zeros_like(p)
    for g in grads:
        g = g + decay * p
        velocity = 0.9 * velocity + g
        p = p - lr * (g + 0.9 * velocity)  # Nesterov: look ahead
    return p


@pytest.mark.parametrize(("name", "by_hand"), [("adamw", adamw_by_hand), ("sgd", sgd_by_hand)])
def test_three_fused_steps_equal_the_update_by_hand(name, by_hand):
    layer = nn.Linear(4, 3).double()
    start = {n: p.detach().clone() for n, p in layer.named_parameters()}
    grads = {n: [torch.randn_like(p) for _ in range(3)] for n, p in start.items()}
    (optimizer,) = create_optimizers(layer, name, lr=0.1, weight_decay=0.3)
    for step in range(3):
        for n, p in layer.named_parameters():
            p.grad = grads[n][step]
        optimizer.step()
    for n, decay in (("weight", 0.3), ("bias", 0.0)):
        expected = by_hand(start[n], grads[n], 0.1, decay)
        torch.testing.assert_close(layer.get_parameter(n).data, expected, rtol=1e-12, atol=1e-12)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = VisionTransformer(replace(preset("vitc_nano"), depth=2))
    muon, adamw = create_optimizers(model, "muon", lr=0.1, weight_decay=0.3, layer_decay=0.5, momentum=0.8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = [[names[id(p)] for group in o.param_groups for p in group["params"]] for o in (muon, adamw)]
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert sorted(taken[0]) == sorted(f"blocks.{i}.{part}.weight" for i in range(2) for part in parts)
    assert sorted(taken[0] + taken[1]) == sorted(names.values())
    rates = [[group["initial_lr"] for group in o.param_groups] for o in (muon, adamw)]
    assert sorted(rates[0]) == [0.1 * 0.25, 0.1 * 0.5]
    assert min(rates[1]) == 0.1 * 0.125
    assert {group["momentum"] for group in muon.param_groups} == {0.8}


def test_muon_refuses_a_model_without_blocks():
    with pytest.raises(UsageError, match="matrices of a model's blocks"):
        create_optimizers(nn.Linear(3, 2), "muon", lr=1.0, weight_decay=0.0)


def test_betas_epsilon_and_momentum_reach_the_optimiser():
    (adamw,) = create_optimizers(
        nn.Linear(3, 2), "adamw", lr=1.0, weight_decay=0.0, betas=(0.8, 0.9), eps=1e-3
    )
    assert {(g["betas"], g["eps"]) for g in adamw.param_groups} == {((0.8, 0.9), 1e-3)}
    (sgd,) = create_optimizers(nn.Linear(3, 2), "sgd", lr=1.0, weight_decay=0.0, momentum=0.0)
    assert {(g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.0, False)}


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(UsageError, match="one of adamw, sgd, muon, got 'lamb'"):
        create_optimizers(nn.Linear(1, 1), "lamb", lr=1.0, weight_decay=0.0)


def moved(model):
    """The model with all weights and buffers changed."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 1
    return model


def states(*models):
    return [{k: v.clone() for k, v in model.state_dict().items()} for model in models]


@pytest.fixture
def model():
    return moved(VisionTransformer(replace(preset("vitc_nano"), depth=1, num_classes=3)))


def assert_average(ema, old, new, rate):
    """`ema` is old + rate·(new − old) on floating tensors and a copy of the new integer ones."""
    for key, tensor in ema.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, old[key] + rate * (new[key] - old[key]))
            assert not torch.equal(tensor, new[key])
        else:
            assert torch.equal(tensor, new[key])


def test_the_average_is_a_plain_copy_during_warmup(model):
    ema = ModelEma(model, rate=0.25, warmup_steps=3)
    for step in range(3):
        moved(model)
        ema.update(step)
        torch.testing.assert_close(ema.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_after_warmup_parameters_and_running_statistics_are_averaged_and_counters_copied(model):
    ema = ModelEma(model, rate=0.25, warmup_steps=1)
    ema.update(0)
    for step in (1, 2):
        (old,), (new,) = states(ema.model), states(moved(model))
        ema.update(step)
        assert {"stem.norms.0.running_var", "stem.norms.0.num_batches_tracked", "class_token"} <= new.keys()
        assert_average(ema, old, new, 0.25)


def test_without_warmup_the_first_update_averages_with_the_first_weights(model):
    ema = ModelEma(model, rate=0.25)
    (old,), (new,) = states(ema.model), states(moved(model))
    ema.update(0)
    assert_average(ema, old, new, 0.25)


def test_an_average_loaded_after_warmup_is_not_overwritten(model):
    (saved,) = states(moved(model))
    ema = ModelEma(moved(model), rate=0.25, warmup_steps=2)
    ema.model.load_state_dict(saved)
    (new,) = states(moved(model))
    ema.update(7)
    assert_average(ema, saved, new, 0.25)


def test_the_average_moves_only_every_so_many_steps(model):
    ema = ModelEma(model, rate=0.25, every=4)
    changed = []
    for step in range(9):
        (old,), _ = states(ema.model), moved(model)
        ema.update(step)
        changed.append(not torch.equal(old["pos_embed"], ema.model.pos_embed))
    assert [step for step, change in enumerate(changed) if change] == [0, 4, 8]


def test_averaging_leaves_the_model_as_it_is(model):
    ema = ModelEma(model, rate=0.25)
    (before,) = states(moved(model))
    ema.update(0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters())


def test_the_papers_rate_of_averaging():
    assert paper_ema_rate(2048, 100, 32) == pytest.approx(0.0065536)
    assert paper_ema_rate(4096, 1, 1000) == 1.0
    assert math.isclose(paper_ema_rate(1024, 50, 1), 2.048e-4)


@pytest.mark.parametrize(("now", "epochs"), [(4.0, 20), (6.5, 8), (10.0, 12)])
def test_another_number_of_epochs_makes_no_jump_and_the_fall_ends_with_the_run(now, epochs):
    before = Schedule(epochs=10, warmup_epochs=2)
    after = before.to_last(epochs, now)
    assert after.at(now) == before.at(now)
    for epoch in (0.5, 3.0, now):
        assert after.at(epoch) == pytest.approx(before.at(epoch))
    assert after.at(epochs) == pytest.approx(after.end_factor)
    rates = [after.at(now + (epochs - now) * i / 50) for i in range(51)]
    assert all(earlier >= later for earlier, later in pairwise(rates))
    assert max(earlier - later for earlier, later in pairwise(rates)) < 0.06


def test_the_same_number_of_epochs_changes_no_schedule():
    assert PAPER.to_last(100, 30.0) == PAPER
    twice = PAPER.to_last(200, 30.0).to_last(150, 40.0)
    assert twice.changes == ((30.0, 200), (40.0, 150))
    assert twice.at(150) == pytest.approx(PAPER.end_factor)


def test_each_layer_below_the_head_learns_slower_than_the_one_above_it():
    with torch.device("meta"):
        model = VisionTransformer(replace(preset("vitc_nano"), depth=3))
    (optimizer,) = create_optimizers(model, "sgd", lr=0.8, weight_decay=0.1, layer_decay=0.5)
    rates = {p: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert {rates[p] for part in (model.norm, model.head) for p in part.parameters()} == {0.8}
    assert [{rates[p] for p in block.parameters()} for block in model.blocks] == [{0.1}, {0.2}, {0.4}]
    lowest = (*model.stem.parameters(), model.class_token, model.pos_embed)
    assert {rates[p] for p in lowest} == {0.05}


def test_parameters_that_are_not_trained_are_in_no_group():
    model = VisionTransformer(replace(preset("vitc_nano"), depth=1))
    model.stem.freeze()
    grouped = {p for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert grouped == set(model.parameters()) - set(model.stem.parameters())
