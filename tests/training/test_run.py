import pytest
import torch

from fastvitc.data import synthetic_index
from fastvitc.errors import FastvitcError
from fastvitc.models.saved import load_model
from fastvitc.training.assembly import assemble
from fastvitc.training.process import Process
from fastvitc.training.recipes import recipe_settings
from fastvitc.training.run import Run
from fastvitc.training.state import RunState

HERE = Process(0, 1, torch.device("cpu"))


def parts_of(state=None, images=8, **changes):
    """A run on random images, `images` / 4 steps an epoch."""
    settings = recipe_settings("digits").changed(
        loader="synthetic",
        compile=False,
        batch_size=4,
        peak_tflops=1.0,
        threads=None,
        epochs=2,
        precision="fp32",
    )
    indices = (synthetic_index(split, images, 3) for split in ("train", "val"))
    return assemble(settings.changed(**changes), HERE, *indices, state)


def weights_of(folder):
    return load_model(folder / "last").state_dict()


def test_weights_that_are_not_finite_are_never_saved_over_those_that_are(tmp_path):
    Run(parts_of(images=4, epochs=1)).train(tmp_path)
    good, state = weights_of(tmp_path), RunState.load(tmp_path)
    diverging = parts_of(state, images=4, epochs=2, mixup=0.0)
    for optimizer in diverging.optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = 1e39
    with pytest.raises(
        FastvitcError, match=r"not finite after epoch 2; what was saved is that of the epochs"
    ):
        Run(diverging, state).train(tmp_path)
    torch.testing.assert_close(weights_of(tmp_path), good, rtol=0, atol=0)
    assert RunState.load(tmp_path).epoch == 1
