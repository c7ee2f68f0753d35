from dataclasses import dataclass
from math import inf, nan
from typing import Annotated

import pytest

from fastvitc.errors import UsageError
from fastvitc.ranges import Ascending, OneOrTwo, above, at_least, check_ranges, share


@dataclass
class Numbers:
    count: Annotated[int, at_least(1)] = 1
    rate: Annotated[float, above(0)] = 0.1
    chance: Annotated[float | None, share()] = None
    crop: Annotated[tuple[float, float], share(zero=False), Ascending()] = (0.1, 1.0)
    size: Annotated[tuple[int, ...], OneOrTwo()] = (1,)
    name: str = "any"


@pytest.mark.parametrize(
    "inside",
    [
        {},
        {"count": 1},
        {"rate": 1e-9},
        {"chance": 0},
        {"chance": 1},
        {"crop": (1, 1)},
        {"crop": (1e-9, 1)},
        {"size": (3, 2)},
    ],
)
def test_a_value_in_its_range_passes(inside):
    check_ranges(Numbers(**inside))


@pytest.mark.parametrize(
    ("outside", "words"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"rate": 0}, "rate must be above 0, got 0"),
        ({"rate": nan}, "rate must be above 0, got nan"),
        ({"rate": inf}, "rate must be above 0, got inf"),
        ({"chance": -0.1}, "chance must be from 0 to 1, got -0.1"),
        ({"chance": 1.1}, "chance must be from 0 to 1, got 1.1"),
        ({"crop": (0, 1)}, "crop must be above 0 and at most 1, got 0 1"),
        ({"crop": (0.5, 0.4)}, "crop must be the smaller number first, got 0.5 0.4"),
        ({"size": (1, 2, 3)}, "size must be one or two numbers, got 1 2 3"),
    ],
)
def test_a_value_outside_is_refused_with_its_name_and_its_range(outside, words):
    with pytest.raises(UsageError, match=words):
        check_ranges(Numbers(**outside))


def test_a_flag_is_named_as_it_is_typed():
    @dataclass
    class Flags:
        batch_size: Annotated[int, at_least(1)] = 0

    with pytest.raises(UsageError, match="--batch-size must be at least 1"):
        check_ranges(Flags(), flags=True)
