"""Decoding with PIL in worker processes: runs anywhere, and is the reference for the other loaders."""

import gc
import signal
from collections.abc import Callable, Iterator

import numpy as np
import PIL
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from fastvitc.data.augment import AugmentSampler, Draws, centre_box, crop_window
from fastvitc.data.base import NO_SPARE, Batch, Loader, LoaderConfig
from fastvitc.data.decode import read_image
from fastvitc.data.policy import FILL, OPS
from fastvitc.data.sampling import Order, Samples
from fastvitc.errors import DataError

#: Images (B, H, W, 3), labels, and the (number, reason) of what cannot be read.
_Loaded = tuple[torch.Tensor, torch.Tensor, list[tuple[int, str]]]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class PilLoader(Loader):
    """Decodes in `workers` processes, or in this one for 0. The batches do not depend on their number."""

    def __init__(self, config: LoaderConfig) -> None:
        super().__init__(config)
        self._pointed = _Order(self.order)
        self._batches: DataLoader | None = None

    def __iter__(self) -> Iterator[Batch]:
        self._pointed.epoch, self._pointed.first = self._epoch, self._first
        if self._batches is None:
            self._batches = DataLoader(
                _Batches(self.config),
                batch_size=None,
                sampler=self._pointed,
                num_workers=self.config.workers,
                persistent_workers=self.config.workers > 0,
                pin_memory=self.config.device.type == "cuda",
                worker_init_fn=_leave_signals_alone,
                generator=torch.Generator(),  # else each epoch would advance the global one
            )
        try:
            for images, labels, bad in self._begin(self._batches):
                for number, reason in bad:
                    self._set_aside(number, reason)
                if self.config.training and (labels < 0).any():
                    raise DataError(NO_SPARE)
                images, labels = (t.to(self.config.device, non_blocking=True) for t in (images, labels))
                yield Batch(images.permute(0, 3, 1, 2), labels)
        except DataError:
            self.close()
            raise
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            raise DataError(
                "a process that reads images was ended from outside, as the system does where memory runs out; "
                "lower --workers or give the run more memory, then continue with --resume"
            ) from error

    @staticmethod
    def _begin(batches: DataLoader) -> Iterator[_Loaded]:
        gc.freeze()  # a forked worker that collected this process's garbage could wait for its threads for ever
        try:
            return iter(batches)
        finally:
            gc.unfreeze()

    def description(self) -> str:
        return f"PilLoader, {self.config.workers or 'no'} worker processes"

    def version(self) -> str:
        return f"PIL {PIL.__version__}"

    def close(self) -> None:
        self._batches = None  # the workers end with it, so nothing that it holds may refer back to the loader


def _leave_signals_alone(_: int) -> None:
    """A signal to the whole process group is the main process's to answer; it ends the workers itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Order(Sampler):
    """(epoch, samples) of each batch of an epoch, from batch number `first` on."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[tuple[int, Samples]]:
        for samples in self._order.epoch(self.epoch, self.first):
            yield self.epoch, samples

    def __len__(self) -> int:
        return self._order.batches - self.first


class _Batches(Dataset):
    """Whole batches by (epoch, samples). One image is open at a time: photographs may be large."""

    def __init__(self, config: LoaderConfig) -> None:
        self._config = config
        self._sampler = AugmentSampler(config.augment, config.image_size, config.seed)
        self._bad: dict[int, str] = {}

    def __getitem__(self, key: tuple[int, Samples]) -> _Loaded:
        epoch, samples = key
        tried: list[int] = []
        pixels = np.zeros((len(samples.numbers), *self._config.image_size, self._config.channels), np.uint8)
        labels = np.full(len(samples.numbers), -1)
        draws = self._sampler.draw(epoch, samples.numbers) if self._config.training else None
        for place in range(len(pixels)):
            for number in samples.candidates(place):
                tried.append(number)
                image = self._read(number)
                if image is not None:
                    if draws is None:
                        prepared = self._centre(image)
                    elif number == samples.numbers[place]:
                        prepared = self._augmented(image, draws, place)
                    else:
                        prepared = self._augmented(image, self._sampler.draw(epoch, np.array([number])), 0)
                    if self._config.channels == 1:
                        prepared = prepared.convert("L")
                    pixels[place] = np.asarray(prepared).reshape(pixels[place].shape)
                    labels[place] = self._config.index.labels[number]
                    break
        bad = [(number, self._bad[number]) for number in tried if number in self._bad]
        return torch.from_numpy(pixels), torch.from_numpy(labels), bad

    def _read(self, number: int) -> Image.Image | None:
        if number in self._bad:
            return None
        try:
            return read_image(self._config.index, number)
        except DataError as error:
            self._bad[number] = str(error)
            return None

    def _augmented(self, image: Image.Image, draws: Draws, i: int) -> Image.Image:
        height, width = self._config.image_size
        size = (image.height, image.width)
        top, left, h, w = crop_window(size, draws.windows[i], draws.positions[i], self._config.augment.ratio)
        image = image.crop((left, top, left + w, top + h))
        image = image.resize((width, height), _RESAMPLING[self._config.interpolation])
        if draws.flips[i]:
            image = ImageOps.mirror(image)
        for op, value, affine in zip(*(stage[i] for stage in draws.policy), strict=True):
            image = _POLICY_OPS[OPS[op]](image, value.item(), affine)
        return image

    def _centre(self, image: Image.Image) -> Image.Image:
        height, width = self._config.image_size
        size = (image.height, image.width)
        top, left, bottom, right = centre_box(size, self._config.image_size, self._config.crop_ratio)
        resampling = _RESAMPLING[self._config.interpolation]
        return image.resize((width, height), resampling, box=(left, top, right, bottom))


def _warp(image: Image.Image, _: float, affine: np.ndarray) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        affine.ravel().tolist(),
        Image.Resampling.BILINEAR,
        fillcolor=(FILL,) * 3,
    )


def _point(image: Image.Image, table: Callable[[int], int]) -> Image.Image:
    return image.point([table(i) for i in range(256)] * 3)


_POLICY_OPS: dict[str, Callable[[Image.Image, float, np.ndarray], Image.Image]] = {
    "identity": lambda image, value, _: image,
    "auto_contrast": lambda image, value, _: ImageOps.autocontrast(image),
    "equalize": lambda image, value, _: ImageOps.equalize(image),
    "invert": lambda image, value, _: ImageOps.invert(image),
    "posterize": lambda image, value, _: ImageOps.posterize(image, int(value)),
    "solarize": lambda image, value, _: _point(image, lambda i: i if i < value else 255 - i),
    "solarize_add": lambda image, value, _: _point(image, lambda i: i + int(value) if i < 128 else i),
    "brightness": lambda image, value, _: ImageEnhance.Brightness(image).enhance(1 + value),
    "contrast": lambda image, value, _: ImageEnhance.Contrast(image).enhance(1 + value),
    "color": lambda image, value, _: ImageEnhance.Color(image).enhance(1 + value),
    "sharpness": lambda image, value, _: ImageEnhance.Sharpness(image).enhance(1 + value),
    "warp": _warp,
}
