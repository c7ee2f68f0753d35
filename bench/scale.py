"""How much the suite measures: quick looks at everything in small, full at the paper's models."""

from dataclasses import dataclass, replace

from fastvitc.models.config import ViTConfig, preset


@dataclass(frozen=True)
class Scale:
    """Sizes and patience. `passes` alternate over the contenders; each has `rounds` of at least `seconds`."""

    models: dict[str, ViTConfig]
    batch_size: int
    passes: int
    rounds: int
    seconds: float


QUICK = Scale(
    models={"vitc_nano of 2 blocks": replace(preset("vitc_nano"), depth=2, num_classes=10)},
    batch_size=16,
    passes=5,
    rounds=2,
    seconds=0.02,
)
FULL = Scale(
    models={name: preset(name) for name in ("vitc_1gf", "vitc_4gf")},
    batch_size=32,
    passes=3,
    rounds=3,
    seconds=0.1,
)
