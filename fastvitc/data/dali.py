"""Decoding with NVIDIA DALI: on the GPU where there is one, else in threads, without worker processes.

The encoded images are read and the random draws made in Python, a batch at a time, and fed in; DALI decodes, crops,
resizes and carries out the policy. So the pipeline keeps no random state: any batch can be the first, and every loader
augments an image the same way.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fastvitc.data.augment import ATTEMPTS, AugmentSampler, covered_size
from fastvitc.data.base import Batch, Loader, LoaderConfig
from fastvitc.data.decode import read_image
from fastvitc.data.policy import FILL, OPS, POLICIES
from fastvitc.errors import DataError, UsageError

try:
    from nvidia.dali import fn, math, pipeline_def, types
    from nvidia.dali.auto_aug import augmentations
    from nvidia.dali.auto_aug.core import select
except ImportError as error:
    raise UsageError(
        "the DALI loader needs NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda130, which the "
        "extra fastvitc[dali] does (nvidia-dali-cuda120 for CUDA 12), or choose the loader pil"
    ) from error


class DaliLoader(Loader):
    """Decodes in `workers` threads, or in one for 0; on a CUDA device with its JPEG decoder."""

    def __init__(self, config: LoaderConfig) -> None:
        super().__init__(config)
        self._source = _Source(config)
        self._pipeline: Any = None

    def __iter__(self) -> Iterator[Batch]:
        device, batches = self.config.device, self.order.epoch(self._epoch, self._first)
        self._rewind()
        self._source.begin(self._epoch, batches)
        for samples in batches:
            try:
                stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
                images, labels = self._pipeline.run(stream)
            except RuntimeError as error:
                self.close()
                raise self._unreadable(samples, error) from error
            yield Batch(
                torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2),
                torch.from_dlpack(labels.as_tensor()),
            )

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
            except RuntimeError:  # a bad file that nobody asked for yet
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

    def _unreadable(self, samples: np.ndarray, error: RuntimeError) -> DataError:
        """The error that names the bad file; DALI's own names none."""
        for sample in samples:
            try:
                read_image(self.config.index, sample)
            except DataError as named:
                return named
        files = ", ".join(self.config.index.name(sample) for sample in samples)
        reason = " ".join(str(error).rpartition("encountered:")[2].split())
        return DataError(f"DALI failed on a batch whose files PIL can read: {reason}; the files: {files}")


class _Source:
    """What is fed to the pipeline for each batch of an epoch: labels, encoded images, and in training the draws."""

    def __init__(self, config: LoaderConfig) -> None:
        self._index = config.index
        self._threads, self._readers = max(1, config.workers), None
        self._sampler = AugmentSampler(config.augment, config.image_size, config.seed)
        self.stages = len(POLICIES[config.augment.policy].stages)
        self.dtypes, self.ndims = [types.INT64, types.UINT8], [0, 1]
        if config.training:
            self.dtypes += [types.FLOAT64, types.FLOAT64, types.INT32]
            self.ndims += [2, 1, 0]
            if self.stages:  # DALI warns of what is fed and not used
                self.dtypes += [types.INT32, types.FLOAT, types.FLOAT]
                self.ndims += [1, 1, 3]
        self.begin(0, [])

    def begin(self, epoch: int, batches: list[np.ndarray]) -> None:
        self._epoch, self._batches = epoch, batches

    def close(self) -> None:
        if self._readers is not None:
            self._readers.shutdown()
            self._readers = None

    def __call__(self, number: int) -> tuple[Any, ...]:
        if number >= len(self._batches):
            raise StopIteration
        samples = self._batches[number]
        if self._readers is None:
            self._readers = ThreadPoolExecutor(self._threads)
        draws = self._sampler.draw(self._epoch, samples)
        return (
            self._index.labels[samples],
            list(self._readers.map(self._encoded, samples)),
            *map(np.ascontiguousarray, (*draws[:3], *draws.policy)),
        )[: len(self.dtypes)]

    def _encoded(self, sample: int) -> np.ndarray:
        return np.frombuffer(self._index.read(sample), np.uint8)


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
    images = fn.resize(images, size=config.image_size)
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
