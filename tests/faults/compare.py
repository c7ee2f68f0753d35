"""Whether two runs ended alike, bit for bit."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvitc.training.report import read_summary
from fastvitc.training.state import RunState, newest_state

#: What is measured of an epoch, and so never comes again.
_TIMES = {"images_per_second", "data_wait", "mfu", "seconds"}


def differences(one: RunState, other: RunState) -> list[str]:
    """What differs between two states but times and settings: weights, buffers, averages, optimisers, meters, rows."""
    names = [field.name for field in fields(RunState) if field.name != "settings"]
    return [where for name in names for where in _unlike(getattr(one, name), getattr(other, name), name)]


def unlike_runs(one: Path, other: Path) -> list[str]:
    """What differs between the newest states, the saved models and the summaries of two runs' folders."""
    found = differences(newest(one), newest(other))
    for name in ("last", "best"):
        file = f"{name}/model.safetensors"
        if (one / file).read_bytes() != (other / file).read_bytes():
            found.append(file)
    rows = [[_without_times(vars(row)) for row in read_summary(run / "summary.csv")] for run in (one, other)]
    if repr(rows[0]) != repr(rows[1]):
        found.append("summary.csv")
    return found


def newest(folder: Path) -> RunState:
    """The newest whole state of a run."""
    return newest_state(folder, lambda warning: None)[1]


def _unlike(one: Any, other: Any, where: str) -> Iterator[str]:
    if type(one) is not type(other):
        yield where
    elif isinstance(one, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or not _same_bits(one, other):
            yield where
    elif isinstance(one, dict):
        one, other = _without_times(one), _without_times(other)
        if one.keys() != other.keys():
            yield where
        else:
            for key in one:
                yield from _unlike(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield where
        for place, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from _unlike(a, b, f"{where}.{place}")
    elif one != other:
        yield where


def _without_times(values: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in values.items() if key not in _TIMES}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))
