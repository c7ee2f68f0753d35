"""Decoding with NVIDIA DALI: on the GPU where there is one, else in threads, without worker processes.

The encoded images are read and the random draws made in Python, a batch at a time, and fed in; DALI decodes, crops,
resizes and carries out the policy. So the pipeline keeps no random state: any batch can be the first, and every loader
augments an image the same way.
"""

import io
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastvitc.data.augment import ATTEMPTS, AugmentSampler, covered_size
from fastvitc.data.base import NO_SPARE, Batch, Loader, LoaderConfig
from fastvitc.data.decode import read_image
from fastvitc.data.policy import FILL, OPS
from fastvitc.data.sampling import Samples
from fastvitc.errors import DataError, UsageError

try:
    import nvidia.dali
    from nvidia.dali import fn, math, pipeline_def, types
    from nvidia.dali.auto_aug import augmentations
    from nvidia.dali.auto_aug.core import select
except ImportError as error:
    raise UsageError(
        "the DALI loader needs NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda130, which the "
        "extra fastvitc[dali] does (nvidia-dali-cuda120 for CUDA 12), or choose the loader pil"
    ) from error


_AHEAD = 4  # batches among which a bad image may be: the one at hand, and those read ahead


class DaliLoader(Loader):
    """Decodes in `workers` threads, or in one for 0; on a CUDA device with its JPEG decoder."""

    def __init__(self, config: LoaderConfig) -> None:
        super().__init__(config)
        self._source = _Source(config, self.bad)
        self._pipeline: Any = None

    def __iter__(self) -> Iterator[Batch]:
        device, batches = self.config.device, self.order.epoch(self._epoch, self._first)
        self._rewind()
        self._source.begin(self._epoch, batches)
        place = 0
        while place < len(batches):
            try:
                stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
                images, labels = self._pipeline.run(stream)
            except (RuntimeError, DataError) as error:
                self.close()
                for number, reason in self._unreadable(batches[place : place + _AHEAD], error):
                    self._set_aside(number, reason)
                self._rewind()
                self._source.begin(self._epoch, batches[place:])
                continue
            place += 1
            yield Batch(
                torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2),
                torch.from_dlpack(labels.as_tensor()),
            )

    def description(self) -> str:
        return f"DaliLoader, {max(1, self.config.workers)} threads"

    def version(self) -> str:
        return f"DALI {nvidia.dali.__version__} on {self.config.device.type}"

    def _resized(self) -> None:
        self._source = _Source(self.config, self.bad)

    def close(self) -> None:
        self._pipeline = None
        self._source.close()

    def _rewind(self) -> None:
        """Bring the pipeline to the start of an epoch, past what it read ahead for an iteration left early."""
        if self._pipeline is not None:
            self._source.begin(self._epoch, [])
            try:
                while True:
                    self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
            except (RuntimeError, DataError):  # a bad file that nobody asked for yet
                self.close()
        if self._pipeline is None:
            c = self.config
            self._pipeline = (_training if c.training else _evaluation)(
                c,
                self._source,
                batch_size=c.batch_size,
                num_threads=max(1, c.workers),
                device_id=c.device.index,
            )
            self._pipeline.build()

    def _unreadable(self, batches: Sequence[Samples], error: Exception) -> list[tuple[int, str]]:
        """(number, reason) of the images that made a batch fail; DALI's own error names none."""
        index = self.config.index
        numbers = [n for samples in batches for n in self._source.chosen(samples) if n is not None]
        found = []
        for number in numbers:
            try:
                read_image(index, number)
            except DataError as named:
                found.append((number, str(named)))
        if found:
            return found
        for number in numbers:  # what PIL can decode and DALI cannot
            try:
                pipeline = _decoding(
                    index.read(number),
                    self.config,
                    batch_size=1,
                    num_threads=1,
                    device_id=self.config.device.index,
                )
                pipeline.run()
            except RuntimeError as refused:
                reason = " ".join(str(refused).rpartition("encountered:")[2].split())
                found.append((number, f"DALI cannot decode the image {index.name(number)}: {reason}"))
        if not found:
            raise DataError(
                f"DALI failed on a batch whose images it can decode one by one: {error}"
            ) from error
        return found


class _Source:
    """What is fed to the pipeline for each batch of an epoch: labels, encoded images, and in training the draws."""

    def __init__(self, config: LoaderConfig, bad: Container[int]) -> None:
        self._index, self._bad = config.index, bad
        self._threads, self._readers = max(1, config.workers), None
        self._sampler = AugmentSampler(config.augment, config.image_size, config.seed)
        self.stages = self._sampler.stages
        self.dtypes, self.ndims = [types.INT64, types.UINT8], [0, 1]
        if config.training:
            self.dtypes += [types.FLOAT64, types.FLOAT64, types.INT32]
            self.ndims += [2, 1, 0]
            if self.stages:  # DALI warns of what is fed and not used
                self.dtypes += [types.INT32, types.FLOAT, types.FLOAT]
                self.ndims += [1, 1, 3]
        self.begin(0, [])

    def begin(self, epoch: int, batches: Sequence[Samples]) -> None:
        self._epoch, self._batches = epoch, batches

    def close(self) -> None:
        if self._readers is not None:
            self._readers.shutdown()
            self._readers = None

    def __call__(self, number: int) -> tuple[Any, ...]:
        if number >= len(self._batches):
            raise StopIteration
        chosen = self.chosen(self._batches[number])
        if self._readers is None:
            self._readers = ThreadPoolExecutor(self._threads)
        draws = self._sampler.draw(self._epoch, np.array([0 if n is None else n for n in chosen]))
        return (
            np.array([-1 if n is None else self._index.labels[n] for n in chosen], np.int64),
            list(self._readers.map(self._encoded, chosen)),
            *map(np.ascontiguousarray, (*draws[:3], *draws.policy)),
        )[: len(self.dtypes)]

    def chosen(self, samples: Samples) -> list[int | None]:
        """The numbers of the images in a batch's places; None where none can be read."""
        places = range(len(samples.numbers))
        found = [next((n for n in samples.candidates(p) if n not in self._bad), None) for p in places]
        if len(samples.spares) and None in found:
            raise DataError(NO_SPARE)
        return found

    def _encoded(self, number: int | None) -> np.ndarray:
        return np.frombuffer(_BLANK if number is None else self._index.read(number), np.uint8)


_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


def _blank() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    return file.getvalue()


_BLANK = _blank()


@pipeline_def
def _decoding(encoded, config):
    return fn.decoders.image(types.Constant(np.frombuffer(encoded, np.uint8)), device=_decoder(config))


@pipeline_def
def _evaluation(config, source):
    labels, encoded = _feed(source)
    height, width = _size(encoded)
    (out_h, out_w), (cover_h, cover_w) = config.image_size, covered_size(config.image_size, config.crop_ratio)
    # as augment.centre_box
    scale = math.max(cover_h / height, cover_w / width)
    resized_h = math.max(cover_h, math.floor(height * scale))
    resized_w = math.max(cover_w, math.floor(width * scale))
    top, left = _rounded_half(resized_h - out_h), _rounded_half(resized_w - out_w)
    images = fn.decoders.image(
        encoded, device=_decoder(config), adjust_orientation=False, jpeg_fancy_upsampling=True
    )
    images = fn.resize(
        images,
        size=config.image_size,
        interp_type=_INTERPOLATION[config.interpolation],
        roi_start=_pair(top * height / resized_h, left * width / resized_w),
        roi_end=_pair((top + out_h) * height / resized_h, (left + out_w) * width / resized_w),
    )
    return _on_device(config, images, labels)


@pipeline_def(enable_conditionals=True)
def _training(config, source):
    labels, encoded, windows, position, flip, *policy = _feed(source)
    corner, window = _crop_window(encoded, windows, position, config.augment.ratio)
    images = fn.decoders.image_slice(
        encoded,
        device=_decoder(config),
        start=corner,
        shape=window,
        axis_names="HW",
        adjust_orientation=False,
    )
    images = fn.resize(images, size=config.image_size, interp_type=_INTERPOLATION[config.interpolation])
    images = fn.flip(images, horizontal=flip)
    for stage in range(source.stages):
        op, value, affine = (draw[stage] for draw in policy)
        images = select([_policy_op(name) for name in OPS], op, images, value, affine)
    return _on_device(config, images, labels)


def _feed(source):
    return fn.external_source(
        source, num_outputs=len(source.dtypes), batch=True, dtype=source.dtypes, ndim=source.ndims
    )


def _decoder(config):
    return "mixed" if config.device.type == "cuda" else "cpu"


def _on_device(config, images, labels):
    if config.channels == 1:
        images = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
    return images, labels.gpu() if config.device.type == "cuda" else labels


def _size(encoded):
    shape = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.FLOAT64)
    return shape[0], shape[1]


def _pair(first, second):
    return fn.cast(fn.stack(first, second), dtype=types.FLOAT)


def _rounded_half(pixels):
    """round(pixels / 2) of whole pixels: the even neighbour where they are odd."""
    return math.floor(pixels / 2) + math.floor((pixels + 1) / 4) - math.floor(pixels / 4)


def _crop_window(encoded, windows, position, ratio):
    """As augment.crop_window: corner and window, int32, each (vertical, horizontal)."""
    height, width = _size(encoded)
    image = fn.stack(height, width)
    tried = math.max(1.0, math.floor(math.sqrt(height * width) * windows + 0.5))
    fits = fn.reductions.min(fn.cast(tried <= image, dtype=types.INT32), axes=1)
    left_to_try = fn.reductions.max(fits * types.Constant(np.arange(ATTEMPTS, 0, -1, dtype=np.int32)))
    if left_to_try > 0:
        window = tried[ATTEMPTS - left_to_try]
    else:
        within_ratio = fn.stack(width * (1 / ratio[0]), height * ratio[1])
        window = math.min(image, math.floor(within_ratio + 0.5))
        position = position * 0.0 + 0.5
    corner = math.floor(position * (image - window + 1.0))
    return fn.cast(corner, dtype=types.INT32), fn.cast(window, dtype=types.INT32)


def _policy_op(name):
    """The operation `name` of `OPS`, of images (HWC), its value and affine map."""
    if name == "identity":
        return lambda images, value, affine: images
    if name == "warp":
        return lambda images, value, affine: fn.warp_affine(images, matrix=affine, fill_value=FILL)
    if name == "equalize":
        return lambda images, value, affine: fn.equalize(images)
    if name == "sharpness":
        return lambda images, value, affine: fn.filter(images, _placed(_sharpness_kernel(value), images))
    augmentation = getattr(augmentations, name)
    if name == "posterize":
        masks = np.array([augmentations.poster_mask_uint8(bits) for bits in range(9)])
        return lambda images, value, affine: augmentation.op(
            images, _placed(types.Constant(masks)[fn.cast(value, dtype=types.INT32)], images)
        )
    if name == "solarize":
        return lambda images, value, affine: augmentation.op(images, _placed(value, images))
    if name == "solarize_add":
        return lambda images, value, affine: augmentation.op(
            images, _placed(fn.cast(value, dtype=types.UINT8), images)
        )
    return lambda images, value, affine: augmentation.op(images, value + 1.0)


def _sharpness_kernel(value):
    unchanged, sharper = (augmentations.sharpness_kernel(v) for v in (0.0, 1.0))
    return types.Constant(unchanged) + value * types.Constant(sharper - unchanged)


def _placed(parameter, images):
    """The parameter on the images' device, where the arithmetic with them needs it."""
    return parameter.gpu() if images.device == "gpu" else parameter
