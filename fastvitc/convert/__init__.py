"""State dicts to and from pycls, torchvision and timm.

`fastvitc.convert.names` has a table of each library's names for the same parts; any two tables make a converter.

A state dict does not hold strides, paddings, epsilons, the number of heads, the way tokens are pooled or the
order of the image's channels. Of these only the last differs between equal models: pycls reads BGR images, so
the input channels of the first convolution are flipped on the way from and to pycls.
"""

import argparse
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvitc.convert.names import ALL, OURS, PYCLS, TIMM, TORCHVISION, TORCHVISION_BEFORE_0_13, Format
from fastvitc.errors import CheckpointError, UsageError

__all__ = ["from_pycls", "from_timm", "from_torchvision", "load", "to_pycls", "to_timm", "to_torchvision"]

_LISTED = 10  # keys named in an error, of each kind


class _Slot(NamedTuple):
    """One tensor of the model; a dimension is a number or the name of a size that the state dict decides."""

    part: str
    index: int
    leaf: str
    dims: tuple[int | str, ...]


def _layout(state: Mapping[str, Any], source: Format, target: Format) -> Iterator[_Slot]:
    """Every tensor that the model found in `state` must have, the first convolution's weight leading."""

    def affine(part: str, index: int, *dims: int | str) -> Iterator[_Slot]:
        yield _Slot(part, index, "weight", dims)
        yield _Slot(part, index, "bias", dims[:1])

    # An index beyond the number of keys cannot belong to a complete model, whatever a damaged file says.
    indices = range(len(state))
    convs = 1 + max((i for i in indices if source.holds(state, "stem_norm", i)), default=-1)
    blocks = ("norm1", "qkv", "attn_proj", "norm2", "fc1", "fc2")
    depth = 1 + max((i for i in indices for part in blocks if source.holds(state, part, i)), default=0)

    channels: int | str = 3 if source.three_channels or target.three_channels else "in_chans"
    for i in range(convs):
        inputs, channels = channels, f"channels_{i}"
        yield _Slot("stem_conv", i, "weight", (channels, inputs, f"kernel_{i}", f"kernel_{i}"))
        yield from affine("stem_norm", i, channels)
        yield _Slot("stem_norm", i, "running_mean", (channels,))
        yield _Slot("stem_norm", i, "running_var", (channels,))
        yield _Slot("stem_norm", i, "num_batches_tracked", ())
    yield from affine("stem_closing" if convs else "patchify", convs, "width", channels, "kernel", "kernel")
    if source.needs_class_token or target.needs_class_token or source.holds(state, "class_token"):
        yield _Slot("class_token", 0, "", (1, 1, "width"))
    yield _Slot("pos_embed", 0, "", ("tokens", 1, "width") if source.tokens_first else (1, "tokens", "width"))
    for j in range(depth):
        yield from affine("norm1", j, "width")
        yield from affine("qkv", j, "3*width", "width")
        yield from affine("attn_proj", j, "width", "width")
        yield from affine("norm2", j, "width")
        yield from affine("fc1", j, "mlp_width", "width")
        yield from affine("fc2", j, "width", "mlp_width")
    yield from affine("norm", 0, "width")
    if source.holds(state, "head"):
        yield from affine("head", 0, "num_classes", "width")


def _convert(state: Mapping[str, Tensor], variants: Iterable[Format], target: Format) -> dict[str, Tensor]:
    """From whichever of the source's variants fits best."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"expected a state dict, names to tensors, got {type(state).__name__}")
    source = _closest(state, variants)
    slots = {source.key(*slot[:3]): slot for slot in _layout(state, source, target)}
    _check(state, {key: slot.dims for key, slot in slots.items()}, source, target)
    converted = {target.key(*slot[:3]): state[key] for key, slot in slots.items()}
    if source.bgr != target.bgr:
        first = next(iter(converted))
        converted[first] = converted[first].flip(1)
    if source.tokens_first != target.tokens_first:
        pos_embed = target.key("pos_embed", 0, "")
        converted[pos_embed] = converted[pos_embed].transpose(0, 1)
    return converted


def _check(
    state: Mapping[str, Any], expected: Mapping[str, tuple[int | str, ...]], source: Format, target: Format
) -> None:
    """Raise one CheckpointError that names every missing, unknown and misshaped tensor."""
    sizes = _sizes(state, expected)
    shapes = {key: tuple(sizes.get(dim, dim) for dim in dims) for key, dims in expected.items()}
    problems = {
        "missing": [key for key in shapes if key not in state],
        "unknown": [str(key) for key in state if key not in shapes],
        "wrong shape": [
            f"{key}: expected {_text(shape)}, found {_text(_shape(state[key]))}"
            for key, shape in shapes.items()
            if key in state and _shape(state[key]) != shape
        ],
    }
    if not any(problems.values()):
        return
    lines = [
        f"cannot convert from {source.library} to {target.library}: "
        f"expected the state dict of a ViT_P or ViT_C of {source.library}"
    ]
    lines += [f"  {kind} ({len(found)}): {_listed(found)}" for kind, found in problems.items() if found]
    lines += [f"  {form.library} always has {form.always}" for form in (source, target) if form.always]
    closest = _closest(state, (source, *ALL))
    if closest.library != source.library:
        lines.append(f"  the keys look like those of {closest.library}: convert from that instead")
    else:
        lines.append(
            "  only pre-norm blocks with biases, a final LayerNorm and one linear head can be converted; "
            "remove tensors that the model does not use"
        )
    raise CheckpointError("\n".join(lines))


def _sizes(state: Mapping[str, Any], expected: Mapping[str, tuple[int | str, ...]]) -> dict[int | str, int]:
    """The size of each named dimension: what most tensors say, so that one bad tensor is reported as one."""
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for key, dims in expected.items():
        value = state.get(key)
        if isinstance(value, Tensor) and value.dim() == len(dims):
            for dim, size in zip(dims, value.shape, strict=True):
                if isinstance(dim, str):
                    votes[dim][size] += 1
    sizes: dict[int | str, int] = {dim: counter.most_common(1)[0][0] for dim, counter in votes.items()}
    if "width" in sizes:
        sizes["3*width"] = 3 * sizes["width"]
    return sizes


def _shape(value: object) -> tuple[int | str, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else (f"{type(value).__name__}, not a tensor",)


def _text(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _listed(items: list[str]) -> str:
    more = [f"and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return "; ".join(items[:_LISTED] + more)


def _closest(state: Mapping[str, Any], formats: Iterable[Format]) -> Format:
    """The format that most of the keys belong to, the first of several."""
    return max(formats, key=lambda form: sum(form.key(*s[:3]) in state for s in _layout(state, form, form)))


def from_pycls(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """pycls → fastvitc, from either generation of names (see `to_pycls`); the first convolution BGR → RGB.

    `state` is not modified, but tensors that need no change are shared with it; so do all six functions.

    Raises:
        CheckpointError: keys are missing, unknown or misshaped; the message lists them all.
    """
    return _convert(state, PYCLS.values(), OURS)


def to_pycls(
    state: Mapping[str, Tensor], generation: Literal["main", "vitconfigs"] = "main"
) -> dict[str, Tensor]:
    """fastvitc → pycls; the first convolution RGB → BGR.

    Args:
        state: state dict of a fastvitc model; pycls itself builds hidden convolutions of 3x3 only.
        generation: the names of pycls's `main` branch (`self_attention.block.in_proj_weight`, position
            embedding (S, 1, d)) or of the paper's, `vitconfigs` (`self_attention.attn_proj.weight`,
            (1, S, d)).

    Raises:
        CheckpointError: as `from_pycls`; also if the images do not have 3 channels.
        UsageError: an unknown generation.
    """
    if generation not in PYCLS:
        raise UsageError(f"generation must be one of {', '.join(PYCLS)}, got {generation!r}")
    return _convert(state, (OURS,), PYCLS[generation])


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision → fastvitc, conv stem or patchify; also from the names before 0.13 (`mlp.linear_1`).

    Raises:
        CheckpointError: keys are missing, unknown or misshaped; the message lists them all.
    """
    return _convert(state, (TORCHVISION, TORCHVISION_BEFORE_0_13), OURS)


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fastvitc → torchvision, for a `VisionTransformer` with the same stem in `conv_stem_configs`.

    torchvision pads every convolution by half its kernel, so stems whose even kernels are not padded compute
    something else there.

    Raises:
        CheckpointError: as `from_torchvision`; also without a class token or with other than 3 channels.
    """
    return _convert(state, (OURS,), TORCHVISION)


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm → fastvitc: a plain ViT, or one with `HybridEmbed(ConvStem(...), proj=False)` for a stem.

    Models with mean pooling convert if they normalise before pooling (`fc_norm=False`). Models made with
    `no_embed_class=True` have one position fewer than a model here expects, and do not load.

    Raises:
        CheckpointError: keys are missing, unknown or misshaped; the message lists them all.
    """
    return _convert(state, (TIMM,), OURS)


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fastvitc → timm, the inverse of `from_timm`.

    Raises:
        CheckpointError: keys are missing, unknown or misshaped; the message lists them all.
    """
    return _convert(state, (OURS,), TIMM)


def _ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _convert(state, (OURS,), OURS)


_READERS = {"fastvitc": _ours, "pycls": from_pycls, "torchvision": from_torchvision, "timm": from_timm}


def load(
    path: str | os.PathLike[str],
    source: Literal["auto", "fastvitc", "pycls", "torchvision", "timm"] = "auto",
    *,
    ema: bool = False,
) -> dict[str, Tensor]:
    """The weights in a checkpoint file, of this library or another, as a state dict of fastvitc on the CPU.

    Args:
        path: a .safetensors file, or one that `torch.save` wrote (.pyth, .pth, .pt, ...); no code in it runs.
            The state dict may be the whole content or its entry `model_state` (pycls), `model` or
            `state_dict`; prefixes that DistributedDataParallel and torch.compile put before every key go.
        source: the library the model is of; "auto" goes by the names in the file.
        ema: of a pycls file take the running average of the weights, `ema_state`.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint, or does not hold a model of `source`.
        UsageError: an unknown source, or ema of a source other than pycls.
    """
    if source not in ("auto", *_READERS):
        raise UsageError(f"source must be one of auto, {', '.join(_READERS)}, got {source!r}")
    if ema and source != "pycls":
        raise UsageError(
            f"ema=True needs a pycls checkpoint; files of {source} keep no average in a known place"
        )
    content = _read(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a state dict, names to tensors, got {type(content).__name__}"
        )
    entries = ("ema_state",) if ema else ("model_state", "model", "state_dict")
    states = [content[entry] for entry in entries if isinstance(content.get(entry), Mapping)]
    if ema and not states:
        raise CheckpointError(f"{path} has no weights in ema_state; load it with ema=False")
    state = _unprefixed(states[0] if states else content)
    try:
        return _READERS[_closest(state, ALL).library if source == "auto" else source](state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        if os.fspath(path).endswith(".safetensors"):
            return load_file(path)
        # The training scripts of torchvision and timm keep their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the readers raise almost anything
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}); expected an intact "
            "file written by torch.save or safetensors, with weights and plain values only"
        ) from error


def _unprefixed(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the prefixes of DistributedDataParallel and torch.compile, where all keys have them."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(str(key).startswith(prefix) for key in state):
            return _unprefixed({key.removeprefix(prefix): value for key, value in state.items()})
    return state
