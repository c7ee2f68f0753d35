"""Augmentation policies: which operation, how strong, with what chance. Drawn here, carried out by each loader.

AutoAugment (Cubuk et al. 2019, arXiv:1805.09501) is the ImageNet policy "v0" of its authors' EfficientNet code.
RandAugment (Cubuk et al. 2020, arXiv:1909.13719) applies 2 of 15 operations at half strength, each growing with
its strength. Both take the ranges of the paper's code (pycls). TrivialAugment (Müller and Hutter 2021,
arXiv:2103.10158) is the "wide" space in 31 strengths, its shift of 32 pixels taken as 1/7 of the side.
"""

from typing import Literal, NamedTuple

import numpy as np

PolicyName = Literal["none", "autoaugment", "randaugment", "trivialaugment"]

# value: -1 takes all of it away, 0 changes nothing
ENHANCE = ("brightness", "contrast", "color", "sharpness")
WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OPS = (
    "identity",
    "auto_contrast",
    "equalize",
    "invert",
    "posterize",  # value: bits kept, 1 to 8
    "solarize",  # value: pixels from this threshold on are inverted, 0 to 256
    "solarize_add",  # value: added to pixels below 128, 0 to 127
    *ENHANCE,
    "warp",  # an affine map; what comes from outside the image is FILL
)
FILL = 128
JITTERED = ("brightness", "contrast", "color")


class Step(NamedTuple):
    """An operation of `OPS` or `WARPS`, its value, and the chances to apply it and to turn the value's sign.

    Shears are in pixels per pixel, translations in shares of the image's side, rotations in degrees.
    """

    op: str
    value: float = 0.0
    chance: float = 1.0
    negate: float = 0.0


class Policy(NamedTuple):
    """Stages carried out one after the other, each a list of steps of which one is drawn.

    joint: all stages take the same position of their lists, rather than each its own.
    """

    stages: tuple[tuple[Step, ...], ...]
    joint: bool = False


class PolicyDraw(NamedTuple):
    """What to do to each of n images in S stages.

    ops: int32 (n, S), positions in `OPS`. values: float32 (n, S), see `OPS`. maps: float32 (n, S, 2, 3): the affine
    map of `warp` from an output position (x, y, 1) to the input's, in pixels, the first one's centre at (0.5, 0.5).
    """

    ops: np.ndarray
    values: np.ndarray
    maps: np.ndarray


def _autoaugment() -> Policy:
    ranges = {
        "auto_contrast": (0, 0),
        "equalize": (0, 0),
        "invert": (0, 0),
        "posterize": (0, 4),
        "solarize": (0, 256),
        "solarize_add": (0, 110),
        "color": (-0.9, 0.9),
        "rotate": (0, 30),
        "shear_x": (0, 0.3),
        "shear_y": (0, 0.3),
        "translate_y": (0, 0.45),
    }
    # (operation, chance, strength in tenths) of the first and the second stage
    sub_policies = (
        (("equalize", 0.8, 1), ("shear_y", 0.8, 4)),
        (("color", 0.4, 9), ("equalize", 0.6, 3)),
        (("color", 0.4, 1), ("rotate", 0.6, 8)),
        (("solarize", 0.8, 3), ("equalize", 0.4, 7)),
        (("solarize", 0.4, 2), ("solarize", 0.6, 2)),
        (("color", 0.2, 0), ("equalize", 0.8, 8)),
        (("equalize", 0.4, 8), ("solarize_add", 0.8, 3)),
        (("shear_x", 0.2, 9), ("rotate", 0.6, 8)),
        (("color", 0.6, 1), ("equalize", 1.0, 2)),
        (("invert", 0.4, 9), ("rotate", 0.6, 0)),
        (("equalize", 1.0, 9), ("shear_y", 0.6, 3)),
        (("color", 0.4, 7), ("equalize", 0.6, 0)),
        (("posterize", 0.4, 6), ("auto_contrast", 0.4, 7)),
        (("solarize", 0.6, 8), ("color", 0.6, 9)),
        (("solarize", 0.2, 4), ("rotate", 0.8, 9)),
        (("rotate", 1.0, 7), ("translate_y", 0.8, 9)),
        (("shear_x", 0.0, 0), ("solarize", 0.8, 4)),
        (("shear_y", 0.8, 0), ("color", 0.6, 4)),
        (("color", 1.0, 0), ("rotate", 0.6, 2)),
        (("equalize", 0.8, 4), ("equalize", 0.0, 8)),
        (("equalize", 1.0, 4), ("auto_contrast", 0.6, 2)),
        (("shear_y", 0.4, 7), ("solarize_add", 0.6, 7)),
        (("posterize", 0.8, 2), ("solarize", 0.6, 10)),
        (("solarize", 0.6, 8), ("equalize", 0.6, 1)),
        (("color", 0.8, 6), ("rotate", 0.4, 5)),
    )

    def stage(place: int) -> tuple[Step, ...]:
        rows = (sub_policy[place] for sub_policy in sub_policies)
        return tuple(_step(op, *ranges[op], tenths / 10, chance) for op, chance, tenths in rows)

    return Policy((stage(0), stage(1)), joint=True)


def _randaugment() -> Policy:
    ranges = {
        "auto_contrast": (0, 0),
        "equalize": (0, 0),
        "invert": (0, 0),
        "posterize": (4, 0),
        "solarize": (256, 0),
        "solarize_add": (0, 110),
        **dict.fromkeys(ENHANCE, (0, 0.9)),
        "rotate": (0, 30),
        "shear_x": (0, 0.3),
        "shear_y": (0, 0.3),
        "translate_x": (0, 0.45),
        "translate_y": (0, 0.45),
    }
    steps = tuple(_step(op, *span, 0.5, negate=op in ENHANCE) for op, span in ranges.items())
    return Policy((steps, steps))


def _trivialaugment() -> Policy:
    ranges = {
        "identity": (0, 0),
        "auto_contrast": (0, 0),
        "equalize": (0, 0),
        "posterize": (8, 2),
        "solarize": (256, 0),
        **dict.fromkeys(ENHANCE, (0, 0.99)),
        "rotate": (0, 135),
        "shear_x": (0, 0.99),
        "shear_y": (0, 0.99),
        "translate_x": (0, 1 / 7),
        "translate_y": (0, 1 / 7),
    }
    steps = (_step(op, *ranges[op], i / 30, negate=op in ENHANCE) for op in ranges for i in range(31))
    return Policy((tuple(steps),))


def _step(
    op: str, low: float, high: float, strength: float, chance: float = 1.0, negate: bool = False
) -> Step:
    value = low + (high - low) * strength
    if op == "posterize":
        value = max(1, round(value))
    elif op in ("solarize", "solarize_add"):
        value = round(value)
    return Step(op, value, chance, 0.5 if negate or op in WARPS else 0.0)


POLICIES: dict[str, Policy] = {
    "none": Policy(()),
    "autoaugment": _autoaugment(),
    "randaugment": _randaugment(),
    "trivialaugment": _trivialaugment(),
}


class PolicySampler:
    """Draws what a policy does to images of one size, (height, width) in pixels.

    Stages of `JITTERED` come before it where there is a `color_jitter`: each value is uniform from minus that to it.
    """

    def __init__(self, name: PolicyName, image_size: tuple[int, int], color_jitter: float = 0.0) -> None:
        policy = POLICIES[name]
        self._joint = policy.joint
        self._tables = [_tabulate(steps, image_size) for steps in policy.stages]
        self._jitter = color_jitter
        self._first = len(JITTERED) if color_jitter else 0
        self.stages = self._first + len(policy.stages)

    def draw(self, uniforms: np.ndarray) -> PolicyDraw:
        """uniforms: float64 in [0, 1), shape (n, S, 3): for each stage which step, whether at all, which sign."""
        n = len(uniforms)
        draw = PolicyDraw(
            np.zeros((n, self.stages), np.int32),
            np.zeros((n, self.stages), np.float32),
            np.zeros((n, self.stages, 2, 3), np.float32),
        )
        for stage, op in enumerate(JITTERED[: self._first]):
            draw.ops[:, stage] = OPS.index(op)
            draw.values[:, stage] = self._jitter * (2 * uniforms[:, stage, 0] - 1)
        for stage, table in enumerate(self._tables, start=self._first):
            _, chance, sign = uniforms[:, stage].T
            choice = (uniforms[:, self._first if self._joint else stage, 0] * len(table.chance)).astype(
                np.int64
            )
            negated = (sign < table.negate[choice]).astype(np.int64)
            draw.ops[:, stage] = np.where(chance < table.chance[choice], table.ops[choice], 0)
            draw.values[:, stage] = table.values[choice, negated]
            draw.maps[:, stage] = table.maps[choice, negated]
        return draw


class _Table(NamedTuple):
    """The K steps of a stage; where there are two values or maps, the second is for the turned sign."""

    chance: np.ndarray  # (K,)
    negate: np.ndarray  # (K,)
    ops: np.ndarray  # (K,)
    values: np.ndarray  # (K, 2)
    maps: np.ndarray  # (K, 2, 2, 3)


def _tabulate(steps: tuple[Step, ...], image_size: tuple[int, int]) -> _Table:
    return _Table(
        np.array([step.chance for step in steps]),
        np.array([step.negate for step in steps]),
        np.array([OPS.index("warp" if step.op in WARPS else step.op) for step in steps]),
        np.array([(step.value, -step.value) for step in steps]),
        np.array([[affine_map(step.op, v, image_size) for v in (step.value, -step.value)] for step in steps]),
    )


def affine_map(op: str, value: float, image_size: tuple[int, int]) -> np.ndarray:
    """The map, float64 (2, 3), of a step of `WARPS` on images of (height, width); see `PolicyDraw.maps`."""
    height, width = image_size
    shear_x, shear_y, shift_x, shift_y, degrees = (value if op == name else 0.0 for name in WARPS)
    sin, cos = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
    linear = np.array([[cos, shear_x - sin], [shear_y + sin, cos]])
    offset = np.array([shift_x * width, shift_y * height])
    if op == "rotate":  # about the centre; shears, as in the papers' code, about the top left corner
        centre = np.array([width, height]) / 2
        offset = centre - linear @ centre
    return np.column_stack([linear, offset])
