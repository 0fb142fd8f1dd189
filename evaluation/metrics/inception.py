"""Inception v3 as FID has it: the network of 2015 in TensorFlow (Szegedy et al.), here in torch; or torchvision's.

It takes the weights that torch-fidelity and pytorch-fid read (`pt_inception-2015-12-05-6726825d.pth`), under their
names. It differs from torchvision's in its averages, which leave out the border, and in the last block, which takes a
maximum. Pictures are scaled to 299x299 as TensorFlow 1 did it: without half pixels, and without a filter.

ASUKA and others measure with torchvision's own weights (`inception_v3_google-0cc3c7bd.pth`), whose 1000 classes tell
them apart. Pictures are scaled to 342 on the short side, and their middle of 299x299 is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreammix_trt.core.torch_weights import load_weights, read_state
from dreammix_trt.evaluation.metrics.metric import U8

SIDE: Final = 299
FEATURES: Final = 2048
_CLASSES: Final = 1000  # of torchvision's network; the other one has 1008
_SHORT: Final = 342  # what torchvision scales the short side to
#: a convolution: name, channels, kernel (height, width), stride, padding (height, width)
_Convolution = tuple[str, int, tuple[int, int], int, tuple[int, int]]


class Inception:
    """Pictures -> the 2048 features that FID compares.

    origin: whose network it is, for people to read.
    """

    def __init__(self, file: Path) -> None:
        """file: the weights. Raises InputError and FileFormatError for a file that is missing or of another network."""
        classes = read_state(file, "--inception").get("fc.weight")
        newer = classes is not None and len(classes) == _CLASSES
        self.origin = "torchvision's Inception" if newer else "TensorFlow's Inception of 2015"
        self._prepare = crop_like_torchvision if newer else resize_like_tensorflow
        self._middle = 127.5 if newer else 128.0
        self._seen: U8 | None = None
        self._features: NDArray[np.float64] = np.zeros(0)
        ignored = ("fc.", "AuxLogits.")
        self._net = load_weights(lambda: make_inception(newer), file, "--inception", ignored=ignored)

    def __call__(self, picture: U8) -> NDArray[np.float64]:
        """uint8 (H, W, 3) -> float64 (2048,). Asked twice in turn about one array, it remembers."""
        import torch

        if picture is self._seen:
            return self._features
        with torch.inference_mode():
            x = torch.from_numpy(self._prepare(picture)).permute(2, 0, 1)[None]
            self._features = np.asarray(self._net((x - self._middle) / self._middle)[0].numpy(), np.float64)
        self._seen = picture
        return self._features


def resize_like_tensorflow(picture: U8, side: int = SIDE) -> NDArray[np.float32]:
    """Bilinear between the pixels at i * size / side: uint8 (H, W, C) -> float32 (side, side, C), 0..255."""
    resized = picture.astype(np.float32)
    for axis in (0, 1):
        length = resized.shape[axis]
        at = np.arange(side, dtype=np.float32) * np.float32(length / side)
        low = at.astype(np.int64)
        high = np.minimum(low + 1, length - 1)
        share = (at - low).reshape((side, 1, 1) if axis == 0 else (1, side, 1)).astype(np.float32)
        below, above = resized.take(low, axis), resized.take(high, axis)
        resized = below + (above - below) * share
    return resized


def crop_like_torchvision(picture: U8) -> NDArray[np.float32]:
    """The middle of a picture whose short side is made 342: uint8 (H, W, 3) -> float32 (299, 299, 3), 0..255."""
    height, width = picture.shape[:2]
    short = min(height, width)
    size = int(_SHORT * width / short), int(_SHORT * height / short)
    left, top = (round((side - SIDE) / 2) for side in size)
    scaled = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR), np.float32)
    return np.ascontiguousarray(scaled[top : top + SIDE, left : left + SIDE])


def make_inception(newer: bool = False) -> Any:
    """The network with random weights: (N, 3, 299, 299) in -1..1 -> (N, 2048).

    newer: torchvision's.
    """
    from torch import nn

    average = "average with border" if newer else "average"
    layers: list[tuple[str, Any]] = [
        ("Conv2d_1a_3x3", _convolve(3, 32, (3, 3), 2)),
        ("Conv2d_2a_3x3", _convolve(32, 32, (3, 3))),
        ("Conv2d_2b_3x3", _convolve(32, 64, (3, 3), 1, (1, 1))),
        ("pool_1", nn.MaxPool2d(3, 2)),
        ("Conv2d_3b_1x1", _convolve(64, 80, (1, 1))),
        ("Conv2d_4a_3x3", _convolve(80, 192, (3, 3))),
        ("pool_2", nn.MaxPool2d(3, 2)),
    ]
    layers += [
        (f"Mixed_5{name}", _block_a(*sizes, average))
        for name, sizes in zip("bcd", ((192, 32), (256, 64), (288, 64)), strict=True)
    ]
    layers += [("Mixed_6a", _block_b(288))]
    layers += [
        (f"Mixed_6{name}", _block_c(768, inner, average))
        for name, inner in zip("bcde", (128, 160, 160, 192), strict=True)
    ]
    layers += [
        ("Mixed_7a", _block_d(768)),
        ("Mixed_7b", _block_e(1280, average)),
        ("Mixed_7c", _block_e(2048, average if newer else "maximum")),
    ]
    net = nn.Sequential()
    for name, layer in layers:
        net.add_module(name, layer)
    net.add_module("mean", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    return net


def _convolve(
    channels: int, out: int, kernel: tuple[int, int], stride: int = 1, padding: tuple[int, int] = (0, 0)
) -> Any:
    """Convolution, batch normalisation, ReLU."""
    from torch import nn

    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(channels, out, kernel, stride, padding, bias=False))
    net.add_module("bn", nn.BatchNorm2d(out, eps=0.001))
    net.add_module("relu", nn.ReLU())
    return net


def _make_block(channels: int, branches: Sequence[Sequence[_Convolution | str]], forks: Sequence[str] = ()) -> Any:
    """A block whose branches see the same and whose outputs are joined.

    branches: steps one after the other: convolutions, or a pool of 3x3: "average" (without the border), "average with
        border", "maximum", or "shrink", which is a maximum that halves the size.
    forks: names of convolutions whose next one sees the same as they do; the two are joined.
    """
    from torch import cat, nn
    from torch.nn import functional

    pools = {
        "average": lambda x: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        "average with border": lambda x: functional.avg_pool2d(x, 3, 1, 1),
        "maximum": lambda x: functional.max_pool2d(x, 3, 1, 1),
        "shrink": lambda x: functional.max_pool2d(x, 3, 2),
    }

    class Block(nn.Module):
        def forward(self, x: Any) -> Any:
            outputs: list[Any] = []
            for branch in branches:
                state, waiting = x, None
                for step in branch:
                    if isinstance(step, str):
                        state = pools[step](state)
                    elif step[0] in forks:
                        waiting = state
                        outputs.append(getattr(self, step[0])(state))
                        state = None
                    else:
                        state = getattr(self, step[0])(waiting if state is None else state)
                outputs.append(state)
            return cat(outputs, 1)

    block = Block()
    for branch in branches:
        width = channels
        for step in branch:
            if isinstance(step, str):
                continue
            name, out, kernel, stride, padding = step
            block.add_module(name, _convolve(width, out, kernel, stride, padding))
            width = width if name in forks else out
    return block


def _one(name: str, out: int) -> _Convolution:
    return name, out, (1, 1), 1, (0, 0)


def _three(name: str, out: int) -> _Convolution:
    return name, out, (3, 3), 1, (1, 1)


def _half(name: str, out: int) -> _Convolution:
    return name, out, (3, 3), 2, (0, 0)


def _wide(name: str, out: int, reach: int = 7) -> _Convolution:
    return name, out, (1, reach), 1, (0, reach // 2)


def _tall(name: str, out: int, reach: int = 7) -> _Convolution:
    return name, out, (reach, 1), 1, (reach // 2, 0)


def _block_a(channels: int, pooled: int, average: str) -> Any:
    return _make_block(
        channels,
        [
            [_one("branch1x1", 64)],
            [_one("branch5x5_1", 48), ("branch5x5_2", 64, (5, 5), 1, (2, 2))],
            [_one("branch3x3dbl_1", 64), _three("branch3x3dbl_2", 96), _three("branch3x3dbl_3", 96)],
            [average, _one("branch_pool", pooled)],
        ],
    )


def _block_b(channels: int) -> Any:
    return _make_block(
        channels,
        [
            [_half("branch3x3", 384)],
            [_one("branch3x3dbl_1", 64), _three("branch3x3dbl_2", 96), _half("branch3x3dbl_3", 96)],
            ["shrink"],
        ],
    )


def _block_c(channels: int, inner: int, average: str) -> Any:
    double = [_tall("branch7x7dbl_2", inner), _wide("branch7x7dbl_3", inner), _tall("branch7x7dbl_4", inner)]
    return _make_block(
        channels,
        [
            [_one("branch1x1", 192)],
            [_one("branch7x7_1", inner), _wide("branch7x7_2", inner), _tall("branch7x7_3", 192)],
            [_one("branch7x7dbl_1", inner), *double, _wide("branch7x7dbl_5", 192)],
            [average, _one("branch_pool", 192)],
        ],
    )


def _block_d(channels: int) -> Any:
    seven = [_wide("branch7x7x3_2", 192), _tall("branch7x7x3_3", 192)]
    return _make_block(
        channels,
        [
            [_one("branch3x3_1", 192), _half("branch3x3_2", 320)],
            [_one("branch7x7x3_1", 192), *seven, _half("branch7x7x3_4", 192)],
            ["shrink"],
        ],
    )


def _block_e(channels: int, pool: str) -> Any:
    return _make_block(
        channels,
        [
            [_one("branch1x1", 320)],
            [_one("branch3x3_1", 384), _wide("branch3x3_2a", 384, 3), _tall("branch3x3_2b", 384, 3)],
            [
                *(_one("branch3x3dbl_1", 448), _three("branch3x3dbl_2", 384)),
                *(_wide("branch3x3dbl_3a", 384, 3), _tall("branch3x3dbl_3b", 384, 3)),
            ],
            [pool, _one("branch_pool", 192)],
        ],
        forks=("branch3x3_2a", "branch3x3dbl_3a"),
    )
