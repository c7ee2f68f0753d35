"""The recipes: settings of a training run under one name. To add one, add its values here and its name to `Recipe`."""

from typing import Any

from fastvitc.errors import UsageError
from fastvitc.training.settings import Recipe, TrainSettings

#: Handwritten digits must not be mirrored, and are cropped less than photographs. So small a model gains little from a
#: second thread, and loses much where another program wants its core.
_DIGITS: dict[str, Any] = {
    "crop_scale": (0.7, 1.0),
    "crop_aspect": (0.85, 1.18),
    "hflip": 0.0,
    "crop_ratio": 1.0,
    "mixup": 0.2,
    "threads": 1,
    "epochs": 12,
    "opt": "muon",
    "lr": 3e-3,
    "warmup_epochs": 1.0,
}

#: Folders of some thousands of photographs or drawings, from scratch; not from the paper.
_SMALL: dict[str, Any] = {
    "epochs": 100,
    "augment": "randaugment",
    "mixup": 0.2,
    "warmup_epochs": 5.0,
}

#: Accuracy soon: of what bench/LOG.md measured in short runs, what paid on drawings and on letters.
_FAST: dict[str, Any] = {
    "epochs": 15,
    "opt": "muon",
    "lr": 2e-3,
    "warmup_epochs": 0.5,
}

#: From weights that were trained elsewhere; after Bao et al. 2022 (BEiT), appendix, and Touvron et al. 2022 (DeiT III).
_FINETUNE: dict[str, Any] = {
    "epochs": 20,
    "lr": 5e-4,
    "layer_decay": 0.75,
    "warmup_epochs": 2.0,
    "drop_path": 0.1,
    "augment": "randaugment",
    "mixup": 0.2,
}

#: The recipes that are not the paper's; they draw the head.
_OWN: dict[str, dict[str, Any]] = {"digits": _DIGITS, "small": _SMALL, "fast": _FAST, "finetune": _FINETUNE}

#: Xiao et al. 2021, section 4 ("ImageNet-1k"): 8 V100 for the 1GF and 4GF models; top-1 error of vitc_4gf after
#: 100/200/400 epochs 20.9/19.2/18.6. The average of the weights and precise BatchNorm are its code's defaults.
_PAPER: dict[str, Any] = {
    "crop_scale": (0.08, 1.0),
    "augment": "autoaugment",
    "opt": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.24,
    "warmup_epochs": 5.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "model_ema": True,
    "model_ema_every": 32,
    "precise_bn": 8192,
}
_PAPER_BATCH = 2048

#: The appendix's best learning rate and weight decay after 50 epochs: (AdamW, SGD).
_PAPER_50EP = {
    "vitp_1gf": ((2e-3, 0.20), (1.9, 1.3e-5)),
    "vitp_4gf": ((2e-3, 0.20), (1.9, 1.3e-5)),
    "vitp_18gf": ((1e-3, 0.24), (1.1, 1.2e-5)),
    "vitc_1gf": ((2.5e-3, 0.19), (1.9, 1.3e-5)),
    "vitc_4gf": ((1e-3, 0.24), (1.3, 2.2e-5)),
    "vitc_18gf": ((1e-3, 0.24), (1.1, 2.7e-5)),
}


def recipe_settings(recipe: Recipe, model: str | None = None, shares: int = 1) -> TrainSettings:
    """The settings of a recipe, before the user's own.

    The paper's recipes divide their total batch of 2048 images by `shares`, the batches of one optimiser step.

    Raises:
        UsageError: the paper gives no such recipe for the model.
    """
    base = TrainSettings().changed(recipe=recipe)
    if recipe in _OWN:
        default = "vitc_nano" if recipe == "digits" else "vitc_4gf"
        return base.changed(model=model or default, **{"init": "drawn_head", **_OWN[recipe]})
    model = model or "vitc_4gf"
    paper = base.changed(model=model, batch_size=max(1, _PAPER_BATCH // shares), **_PAPER)
    if recipe.startswith("paper-50ep"):
        if model not in _PAPER_50EP:
            raise UsageError(
                f"the paper gives 50-epoch settings for {', '.join(_PAPER_50EP)}, not for {model}"
            )
        sgd = recipe.endswith("sgd")
        lr, weight_decay = _PAPER_50EP[model][sgd]
        return paper.changed(epochs=50, opt="sgd" if sgd else "adamw", lr=lr, weight_decay=weight_decay)
    if model.endswith("36gf"):
        paper = paper.changed(lr=6e-4, weight_decay=0.28)
    return paper.changed(epochs=int(recipe.removeprefix("paper-").removesuffix("ep")))
