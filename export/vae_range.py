"""Finds the parts of a float16 VAE that must stay float32, by running it on pictures and on noise.

The residual stream of SDXL's own VAE has values beyond 65504, the largest float16. In float16 they become infinite,
then NaN after the next norm, and the picture is black. The weights do not show this. So the torch form runs in float32
and we look at every activation. The units whose activations come near the limit of float16 stay float32 in the exported
graph, from the first such unit to the last, because the same stream flows between them.

Why float32 and not bfloat16, which has the same range: bfloat16 keeps 8 bits of a value, and smooth areas of the
picture show its steps as bands. We compared the embedded model's decoder on four drawn pictures with float32
throughout. With bfloat16: 57 dB, and a quarter of all 8-bit values change. With float32 as TF32: 80 dB and 2 %. (With
float16 throughout, where it fits: 75 dB and 3 %.) TF32, as tensor cores take float32, has 11 bits of each factor and
keeps float32 sums, so the stream itself loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.network_weights import weights_of
from dreammix_trt.core.networks import describe_networks
from dreammix_trt.core.pictures import read_image
from dreammix_trt.export.torch_module import make_torch_module

Kind = Literal["vae_encoder", "vae_decoder", "asuka_decoder"]
Floats = NDArray[np.float32]
Samples = Mapping[str, Sequence[tuple[Floats, ...]]]

#: increase it when a change here gives another result for the same VAE
REVISION = 1
#: the largest float16
LARGEST = 65504.0
#: the largest activation that a float16 unit may have here. The VAE runs on few pictures, smaller than those it will be
#: used on, so we leave a factor of eight for all others
LIMIT = LARGEST / 8
#: largest sides in pixels: of the drawn scene and the user's pictures, and of all other samples
SIDE, SMALL_SIDE = 256, 128
BATCH = 4


@dataclass(frozen=True)
class RangeReport:
    """The result of running half of a VAE in float32.

    units: names of `units.vae_units` for which float16 is too narrow, in order and without gaps in each chain, as
        `Network.wide` needs them.
    peaks: unit -> the largest magnitude of its activations.
    limit: the limit that the peaks were compared with.
    samples: how many samples of each kind ran ("drawn", "noise", "images", "latents").
    """

    units: tuple[str, ...]
    peaks: Mapping[str, float]
    limit: float
    samples: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a passport. Peaks have three digits, since further ones differ between machines."""
        peaks = {name: float(f"{peak:.3g}") for name, peak in self.peaks.items()}
        return {"units": list(self.units), "peaks": peaks, "limit": self.limit, "samples": dict(self.samples)}


def find_wide_units(base: BaseFiles, kind: Kind, images: Sequence[Path] = (), *, limit: float = LIMIT) -> RangeReport:
    """Find the units of an encoder or decoder that must stay float32 when the rest is float16. Needs torch.

    The encoder runs on drawn pictures (natural noise, smooth areas with hard edges, saturated patches, a scene with
    glossy lights), on uniform noise and on the user's pictures. The decoder runs on the means of all these and on
    normal latents. ASUKA's decoder also gets the picture, once with its left half as the hole and once with its right,
    so that the latent and the known pixels both reach every place. The samples are the same in every call.

    On two cores this takes 0.1 s for a half of the embedded model. For SDXL it takes 3 s (encoder) and 9 s (decoder,
    1.4 GB of memory), and about 1 s and 4 s more for each of `images`.

    images: the user's pictures.
    limit: the largest activation that a float16 unit may have.

    Raises `FileFormatError` naming the VAE when it gives values that are not finite in float32 or results beyond
    float16, and `InputError` naming an image that cannot be read.
    """
    import torch

    networks = {network.name: network for network in describe_networks(base)}

    def run(name: Kind, samples: Samples) -> tuple[_Watch, dict[str, list[Floats]]]:
        watch = _Watch(name, _file_of(base, name), limit)
        return watch, watch.run(make_torch_module(networks[name], weights_of(base, name)), samples)

    pictures = _draw_pictures(base.native_side, images)
    samples = _alone(pictures)
    with torch.inference_mode():
        if kind != "vae_encoder":
            latents = {**run("vae_encoder", samples)[1], "latents": _draw_latents(base)}
            samples = _add_known(latents, pictures) if kind == "asuka_decoder" else _alone(latents)
        watch, _ = run(kind, samples)
    return watch.report({name: len(values) for name, values in samples.items()})


@dataclass
class _Watch:
    """Records every activation of the units: all leaf modules, residual sums, attention scores."""

    kind: Kind
    file: Path
    limit: float
    peaks: dict[str, float] = field(default_factory=dict)

    def run(self, module: Any, samples: Samples) -> dict[str, list[Floats]]:
        """Run the module and record it.

        samples: its inputs, by kind of sample.

        Returns its first result for each sample. Raises `FileFormatError` like `find_wide_units`.
        """
        import torch

        self._hook(module)
        results: dict[str, list[Floats]] = {}
        for name, values in samples.items():
            results[name] = []
            for batch in _batch(values):
                out = module(*map(torch.from_numpy, batch))
                results[name] += [*(out[0] if isinstance(out, tuple) else out).numpy()]
        largest = max(float(np.abs(value).max()) for values in results.values() for value in values)
        if largest > LARGEST:
            raise FileFormatError(
                f"{self.file}: the {self._half} gives values of {largest:.3g}, which no picture or latent has; "
                f"{self._remedy}"
            )
        return results

    def _hook(self, module: Any) -> None:
        from dreammix_trt.export.units import vae_units

        for name, unit in vae_units(self.kind, module.network).items():
            self.peaks[name] = 0.0
            unit.register_forward_pre_hook(self._at_input(name))
            for part in unit.modules():
                if part is unit or not any(part.children()):
                    part.register_forward_hook(self._at_output(name))
                if hasattr(part, "to_q"):
                    self._hook_scores(name, part)

    def report(self, samples: Mapping[str, int]) -> RangeReport:
        from dreammix_trt.export.units import split_chains

        units: list[str] = []
        for names in split_chains(self.peaks):
            over = [number for number, name in enumerate(names) if self.peaks[name] > self.limit]
            units += names[over[0] : over[-1] + 1] if over else []
        return RangeReport(tuple(units), self.peaks, self.limit, samples)

    @property
    def _half(self) -> str:
        return {"asuka_decoder": "ASUKA decoder"}.get(self.kind, self.kind.replace("vae_", "VAE's "))

    @property
    def _remedy(self) -> str:
        return "use another ASUKA folder (--asuka)" if self.kind == "asuka_decoder" else "use another VAE (--vae)"

    def _see(self, name: str, x: Any) -> None:
        low, high = (float(end) for end in x.aminmax())
        if not np.isfinite(high - low):
            raise FileFormatError(
                f"{self.file}: the {self._half} is damaged: {name} gives values that are not finite in float32; "
                f"download it again or {self._remedy}"
            )
        self.peaks[name] = max(self.peaks[name], -low, high)

    def _at_input(self, name: str) -> Callable[..., None]:
        return lambda _module, inputs: self._see(name, inputs[0])

    def _at_output(self, name: str) -> Callable[..., None]:
        return lambda _module, _inputs, out: self._see(name, out)

    def _hook_scores(self, name: str, attention: Any) -> None:
        """Record the products before the softmax, which are no module's output. q and k (B, T, C) are scaled as in the
        graph."""
        kept: dict[str, Any] = {}

        def see(part: str, out: Any) -> None:
            kept[part] = out.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            if len(kept) == 2:
                q, k = kept.pop("q"), kept.pop("k")
                self._see(name, (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2))

        attention.to_q.register_forward_hook(lambda _module, _inputs, out: see("q", out))
        attention.to_k.register_forward_hook(lambda _module, _inputs, out: see("k", out))


def _file_of(base: BaseFiles, kind: Kind) -> Path:
    """The file or folder by which the user knows the VAE, or ASUKA's decoder."""
    if kind == "asuka_decoder" and base.asuka:
        return base.asuka.folder
    return base.vae or (base.folder if base.folder.is_file() else base.folder / "vae")


def _draw_latents(base: BaseFiles) -> list[Floats]:
    """Draw normal latents (C, h, w), divided by the scaling factor."""
    side, rng = min(SMALL_SIDE, base.native_side) // 8, np.random.default_rng(1)
    normal = rng.standard_normal((2, base.latent_channels, side, side)) / base.scaling_factor
    return [*normal.astype(np.float32)]


def _alone(values: Mapping[str, Sequence[Floats]]) -> Samples:
    """Samples of a network that takes nothing else."""
    return {name: [(each,) for each in several] for name, several in values.items()}


def _add_known(latents: Mapping[str, Sequence[Floats]], pictures: Mapping[str, Sequence[Floats]]) -> Samples:
    """Latents with the pictures that they are of (noise where they are of none), and either half as the hole."""
    rng, samples = np.random.default_rng(2), dict[str, list[tuple[Floats, ...]]]()
    for name, values in latents.items():
        samples[name] = []
        for number, latent in enumerate(values):
            height, width = (FACTOR * side for side in latent.shape[1:])
            noise = rng.uniform(-1, 1, (3, height, width)).astype(np.float32)
            image = pictures[name][number] if name in pictures else noise
            hole = np.broadcast_to(np.arange(width) < width // 2, (1, height, width)).astype(np.float32)
            samples[name] += [(latent, image, hole), (latent, image, 1 - hole)]
    return samples


def _batch(samples: Sequence[tuple[Floats, ...]]) -> Iterator[tuple[Floats, ...]]:
    """Stack neighbours of equal shapes, at most `BATCH`: on small networks every operator call has its cost."""
    for _, equal in groupby(samples, key=lambda sample: [each.shape for each in sample]):
        group = list(equal)
        for start in range(0, len(group), BATCH):
            yield tuple(map(np.stack, zip(*group[start : start + BATCH], strict=True)))


def _draw_pictures(native_side: int, images: Sequence[Path]) -> dict[str, list[Floats]]:
    """Draw or read pictures (3, H, W) in [-1, 1], by kind."""
    rng = np.random.default_rng(0)
    large, small = min(SIDE, native_side), min(SMALL_SIDE, native_side)
    drawn = [_draw_scene(large), _draw_noise(rng, small), _draw_smooth(small), _draw_patches(rng, small)]
    noise = rng.uniform(-1, 1, (1, 3, small, small)).astype(np.float32)
    pictures = {"drawn": drawn, "noise": [*noise]}
    return {**pictures, "images": [_read_picture(path, large) for path in images]} if images else pictures


def _read_picture(path: Path, side: int) -> Floats:
    """Read the largest square of a picture, scaled to `side`."""
    square = ImageOps.fit(Image.fromarray(read_image(path).seen), (side, side), Image.Resampling.LANCZOS)
    pixels: Floats = np.asarray(square, np.float32).transpose(2, 0, 1) / 127.5 - 1
    return pixels


def _grid(side: int) -> tuple[Floats, Floats]:
    """(y, x) of every pixel, each in [0, 1]."""
    y, x = np.mgrid[:side, :side].astype(np.float32) / max(side - 1, 1)
    return y, x


def _draw_noise(rng: np.random.Generator, side: int) -> Floats:
    """Draw noise like photographs: its spectrum falls as 1/f, and its channels are similar."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1 / side
    values = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, side, side))) / frequency, (side, side))
    mixed = values.mean(0) + 0.5 * values
    noise: Floats = np.clip(0.5 * mixed / mixed.std(), -1, 1).astype(np.float32)
    return noise


def _draw_smooth(side: int) -> Floats:
    """Draw a gradient in each channel, with a disc and a bar of other gradients in it."""
    y, x = _grid(side)
    picture = np.stack([2 * x - 1, 2 * y - 1, 1 - x - y])
    disc = (x - 0.35) ** 2 + (y - 0.4) ** 2 < 0.06
    bar = np.abs(x + y - 1.5) < 0.04
    cut: Floats = np.where(disc, -picture, np.where(bar, np.float32(1), picture)).astype(np.float32)
    return cut


def _draw_patches(rng: np.random.Generator, side: int) -> Floats:
    """Draw black, white and primary colours side by side, one patch of single pixels, one of thin lines."""
    colours = rng.permutation(np.stack([np.ravel(part) for part in np.meshgrid(*[[-1, 1]] * 3)], 1).repeat(2, 0))
    picture = np.kron(colours.T.reshape(3, 4, 4), np.ones((1, -(-side // 4), -(-side // 4))))[:, :side, :side]
    row, column = np.mgrid[:side, :side]
    quarter = side // 4
    picture[:, :quarter, :quarter] = np.where((row + column) % 2, 1, -1)[:quarter, :quarter]
    picture[:, -quarter:, -quarter:] = np.where(row % 4, 1, -1)[:quarter, :quarter]
    return picture.astype(np.float32)


def _draw_scene(side: int) -> Floats:
    """Draw a glossy red ball and its shadow on a striped table before a dark wall with small bright lights."""
    y, x = _grid(side)
    wall = np.stack([0.15 * y, 0.1 * y, 0.1 + 0.3 * y])
    lights = sum(np.exp(-((x - a) ** 2 + (y - 0.12) ** 2) / 1e-4) for a in (0.15, 0.3, 0.7, 0.9))
    table = np.stack([0.75 - 0.2 * y, 0.6 - 0.2 * y, 0.45 - 0.2 * y]) * np.where(
        np.sin(80 * (x / (y + 0.1))) > 0, 1, 0.8
    )
    picture = np.where(y > 0.55, table, wall + lights)
    picture = picture * (1 - 0.7 * np.exp(-(((x - 0.55) / 0.25) ** 2 + ((y - 0.78) / 0.05) ** 2)))
    u, v = (x - 0.45) / 0.25, (y - 0.5) / 0.25
    height = np.sqrt(np.clip(1 - u**2 - v**2, 0, None))
    light = np.clip(0.6 * height - 0.5 * u - 0.6 * v, 0.05, None)
    ball = np.stack([0.9 * light, 0.15 * light, 0.1 * light]) + light**40
    scene: Floats = np.clip(2 * np.where(height > 0, ball, picture) - 1, -1, 1).astype(np.float32)
    return scene
