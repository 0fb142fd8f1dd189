"""Training a subject's LoRA on the patched UNet (paper, section 3.3; reference/dreammix.md, section 4)."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError, MissingExtraError
from dreammix_trt.core.files import atomic_directory, sha256_of, write_json
from dreammix_trt.core.lora import FILE_NAME
from dreammix_trt.trainer.data import article, draw_view, latent_mask, read_photographs
from dreammix_trt.trainer.losses import Weights, loss_weights, reweighted_loss

if TYPE_CHECKING:
    from torch import Tensor

    from dreammix_trt.trainer.networks import TrainingNetworks

log = logging.getLogger(__name__)
Progress = Callable[[str, float, str], None]

TARGETS = ("to_k", "to_v", "to_out.0")
RECORD = "train.json"
MOST_RANK = 256


@dataclass(frozen=True)
class Recipe:
    """What suits a base: small ones train for less time with larger steps and batches.

    regular: share of regular samples (eq. 8); regular_pictures: how many of them the base paints first; views: training
    views drawn of all photographs together; constant: share of the steps at the full learning rate, which then falls
    to zero in a straight line (1.0: never, as in the reference); captioned: share of the subject's samples that are
    trained under one of the further captions, where there are some.
    """

    steps: int
    learning_rate: float
    batch: int
    views: int
    regular: float
    regular_pictures: int
    constant: float = 1.0
    captioned: float = 0.5

    def rate_at(self, step: int, steps: int) -> float:
        """The factor of the learning rate at a step, 0-based."""
        left = (steps - step) / steps
        return 1.0 if self.constant >= 1 else min(1.0, left / (1 - self.constant))


# Chosen on the embedded model by eye and by its attribute judge: without regular pictures "a green sks mug" breaks up
# into the subject's own tones, with three in ten the subject itself is learnt too weakly.
SMALL = Recipe(steps=800, learning_rate=2.5e-3, batch=4, views=60, regular=0.1, regular_pictures=12, constant=0.5)
FULL = Recipe(steps=1000, learning_rate=1e-4, batch=4, views=60, regular=0.3, regular_pictures=24)


@dataclass(frozen=True)
class TrainRecord:
    """What a training did; `train.json` holds the same. loss: mean of the last tenth of the steps; seconds: wall."""

    steps: int
    seconds: float
    loss: float
    first_loss: float
    learning_rate: float
    rank: int
    loss_name: str
    token: str
    class_name: str
    prompt: str
    captions: tuple[str, ...]
    photographs: tuple[str, ...]
    seed: int
    threads: int
    parameters: int
    base: str
    base_hashes: dict[str, str]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """Encoded views, a row each: latents, masked (N, 4, h, w); mask (N, 1, h, w); sharp sides, caption numbers (N,)."""

    latents: Tensor
    masked: Tensor
    mask: Tensor
    sharp: Tensor
    captions: Tensor


def train_lora(
    photos: str | Path,
    class_name: str,
    out: str | Path,
    *,
    base: str | Path | BaseFiles | None = None,
    token: str = "sks",
    prompt: str | None = None,
    captions: Sequence[str] = (),
    rank: int = 4,
    steps: int | None = None,
    learning_rate: float | None = None,
    loss: str = "reference",
    seed: int = 0,
    merged: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
) -> TrainRecord:
    """Train a LoRA of one subject and write it to the directory `out`, whole or not at all.

    photos: folder with image/ and mask/ (`data.read_photographs`); class_name: what the subject is, e.g. "mug"; base:
    diffusers folder (None: the embedded model); prompt: instance caption, default "a photo of a {token} {class_name}";
    captions: further captions that name attributes of the subject ("a photo of a blue sks mug"), so that an attribute
    belongs to its word and not to the token (paper, section 3.3);
    steps, learning_rate: None takes what suits the base; loss: "reference" or "paper"; merged: also write the merged
    UNet as `unet/`; threads: CPU threads (None: torch's choice). progress(name, fraction, message) is called each step.
    Same seed, threads and machine: the same bytes in the LoRA file.

    Writes `pytorch_lora_weights.safetensors` (diffusers' names, alpha = rank) and `train.json`.
    Raises InputError for parameters, photographs or a place that cannot be used, FileFormatError for the base,
    MissingExtraError without the `train` extra.
    """
    class_name, token = class_name.strip(), token.strip()
    weights = loss_weights(loss)
    _check(class_name, token, rank, steps, learning_rate, seed, threads)
    files = base if isinstance(base, BaseFiles) else BaseFiles.open(base)
    recipe = recipe or (SMALL if files.native_side <= 256 else FULL)
    steps, rate = steps or recipe.steps, learning_rate or recipe.learning_rate
    prompt = (prompt or f"a photo of {article(token)} {token} {class_name}").strip()
    captions = tuple(caption.strip() for caption in captions)
    for text in (prompt, *captions):
        if token not in text.lower().split():
            raise InputError(f"the prompt {text!r} lacks the token {token!r}; without it the subject has no name")
    photographs = read_photographs(photos)
    started = time.monotonic()
    with atomic_directory(out, marker=RECORD) as folder, _torch_threads(threads) as used:
        trainer = _Trainer(files, rank, rate, weights, seed, recipe, progress or (lambda *_: None))
        trainer.prepare(photographs, class_name, (prompt, *captions))
        history = trainer.run(steps)
        last = history[-max(1, len(history) // 10) :]
        first = history[: max(1, len(history) // 10)]
        record = TrainRecord(
            steps,
            round(time.monotonic() - started, 2),
            float(np.mean(last)),
            float(np.mean(first)),
            rate,
            rank,
            loss,
            token,
            class_name,
            prompt,
            captions,
            tuple(photograph.name for photograph in photographs),
            seed,
            used,
            trainer.parameters,
            files.folder.name,
            files.content_hashes(),
            asdict(recipe),
        )
        _write(folder, trainer, record, merged)
    log.info("%s: %d steps in %.0f s, loss %.4f", out, steps, record.seconds, record.loss)
    return record


class _Trainer:
    """The LoRA on one base: prepared samples, optimizer, loop."""

    def __init__(
        self, base: BaseFiles, rank: int, rate: float, weights: Weights, seed: int, recipe: Recipe, progress: Progress
    ) -> None:
        try:
            import torch
            from peft import LoraConfig

            from dreammix_trt.trainer.networks import TrainingNetworks
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{error.name} is not installed, training needs it: pip install dreammix-trt[train]"
            ) from error
        progress("train", 0.0, "reading the base")
        self.networks: TrainingNetworks = TrainingNetworks(base)
        self.recipe, self._weights, self._progress, self._seed = recipe, weights, progress, seed
        self._dice = torch.Generator().manual_seed(seed)
        self._config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS))
        self._rate = rate
        self.parameters = 0

    def prepare(self, photographs: Any, class_name: str, prompts: Sequence[str]) -> None:
        """Draw and encode the views, paint the regular pictures, then put the adapters in."""
        import torch

        rng = np.random.default_rng([self._seed, 11])
        side, recipe = self.networks.base.native_side, self.recipe
        count = max(recipe.views, len(photographs))
        views = [draw_view(rng, photographs[n % len(photographs)], side) for n in range(count)]
        self._progress("train", 0.01, f"encoding {len(views)} views of {len(photographs)} photographs")
        self._subject = _encoded(self.networks, views)
        self._text = [self.networks.encode_text([prompt]) for prompt in prompts]
        self._own_captions = len(prompts)
        self._regular: Samples | None = None
        if recipe.regular > 0 and recipe.regular_pictures > 0:
            self._regular = self._paint_regular(class_name)
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            self.networks.unet.add_adapter(self._config)
        self._trained = [value for value in self.networks.unet.parameters() if value.requires_grad]
        self.parameters = sum(value.numel() for value in self._trained)

    def _paint_regular(self, class_name: str) -> Samples:
        import torch

        from dreammix_trt.trainer import regular

        count = self.recipe.regular_pictures
        prompts = regular.captions(class_name, count)
        rows = torch.arange(count) % len(self._subject.latents)
        start = _rows(self._subject, rows)

        def report(fraction: float) -> None:
            self._progress("train", 0.02 + 0.08 * fraction, f"painting {count} regular pictures of the class")

        painted = regular.repaint(self.networks, start.latents, start.masked, start.mask, prompts, self._dice, report)
        distinct = list(dict.fromkeys(prompts))
        states, pooled = self.networks.encode_text(distinct)
        self._text += [(states[n : n + 1], pooled[n : n + 1]) for n in range(len(distinct))]
        captions = torch.tensor([self._own_captions + distinct.index(prompt) for prompt in prompts])
        return Samples(painted, start.masked, start.mask, start.sharp, captions)

    def run(self, steps: int) -> list[float]:
        """All steps; returns the loss of each. A loss that is not finite ends the training with an InputError."""
        import torch

        optimizer = torch.optim.AdamW(self._trained, lr=self._rate, betas=(0.9, 0.999), weight_decay=1e-4)
        history: list[float] = []
        begun = time.monotonic()
        shown = 0.0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = self._rate * self.recipe.rate_at(step, steps)
            loss = self._loss()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InputError(
                    f"the loss is {value} at step {step + 1}; the training diverged, "
                    f"take a smaller learning rate than {self._rate:g}"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            optimizer.step()
            history.append(value)
            shown = value if not step else 0.95 * shown + 0.05 * value
            left = (time.monotonic() - begun) / (step + 1) * (steps - step - 1)
            self._progress("train", 0.1 + 0.9 * (step + 1) / steps, f"loss {shown:.4f}, {_clock(left)} left")
        return history

    def _loss(self) -> Tensor:
        """One batch, each row from D_s or, with the recipe's share, from D_r; t uniform, target the noise."""
        import torch

        dice, count = self._dice, self.recipe.batch
        batch = _rows(self._subject, torch.randint(len(self._subject.latents), (count,), generator=dice))
        if self._own_captions > 1:
            named = torch.rand(count, generator=dice) < self.recipe.captioned
            further = torch.randint(1, self._own_captions, (count,), generator=dice)
            batch = replace(batch, captions=torch.where(named, further, batch.captions))
        if self._regular is not None:
            other = _rows(self._regular, torch.randint(len(self._regular.latents), (count,), generator=dice))
            batch = _chosen(torch.rand(count, generator=dice) < self.recipe.regular, other, batch)
        noise = torch.randn(batch.latents.shape, generator=dice)
        # stratified over the batch: every row is still uniform, the batch's loss varies less
        places = (torch.randperm(count, generator=dice) + torch.rand(count, generator=dice)) / count
        t = (places * 1000).long().clamp_(max=999)
        signal, spread = (table[t][:, None, None, None] for table in (self.networks.signal, self.networks.noise))
        texts = [self._text[n] for n in batch.captions.tolist()]
        text = torch.cat([states for states, _ in texts]), torch.cat([pooled for _, pooled in texts])
        feature = self.networks.feature(batch.mask, batch.masked)
        noisy = signal * batch.latents + spread * noise
        eps = self.networks.predict(noisy, t, text, self._time_ids(batch), feature)
        return reweighted_loss(eps, noise, batch.mask, self._weights)

    def _time_ids(self, batch: Samples) -> Tensor:
        """(N, 6): original size, no crop offset, target size. A view scaled up keeps its true size; a sharp one varies.

        The loop asks for up to 1.5 times the size, so larger ones must not be news to the LoRA.
        """
        import torch

        side = self.networks.base.native_side
        larger = side * (1 + 0.6 * torch.rand(len(batch.sharp), generator=self._dice))
        size = torch.where(batch.sharp < side, batch.sharp, larger).round()
        zero, full = torch.zeros_like(size), torch.full_like(size, float(side))
        return torch.stack([size, size, zero, zero, full, full], 1)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module by its diffusers name -> (down (rank, in), up (out, rank))."""
        found = {}
        for name, module in self.networks.unet.named_modules():
            if hasattr(module, "lora_A"):
                down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
                found[name] = (down.detach().clone().contiguous(), up.detach().clone().contiguous())
        return found


def _encoded(networks: TrainingNetworks, views: list[Any]) -> Samples:
    import torch

    from dreammix_trt.trainer.networks import to_latent_range

    pictures = to_latent_range([view.image for view in views])
    holes = np.stack([view.hole for view in views])[:, None]
    cells = torch.from_numpy(np.stack([latent_mask(view.hole) for view in views]))[:, None]
    sharp = torch.tensor([float(view.sharp_side) for view in views])
    # the hole is mid grey, as the head saw it in the base's own training
    masked = networks.encode(np.where(holes, np.float32(0), pictures))
    return Samples(networks.encode(pictures), masked, cells, sharp, torch.zeros(len(views), dtype=torch.long))


def _rows(samples: Samples, rows: Tensor) -> Samples:
    return Samples(*(getattr(samples, name)[rows] for name in Samples.__dataclass_fields__))


def _chosen(first: Tensor, yes: Samples, no: Samples) -> Samples:
    import torch

    parts = []
    for name in Samples.__dataclass_fields__:
        a, b = getattr(yes, name), getattr(no, name)
        parts.append(torch.where(first.reshape(-1, *(1,) * (a.ndim - 1)), a, b))
    return Samples(*parts)


def _write(folder: Path, trainer: _Trainer, record: TrainRecord, merged: bool) -> None:
    from safetensors.torch import save

    factors = trainer.factors()
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"unet.{name}.lora.down.weight"] = down
        tensors[f"unet.{name}.lora.up.weight"] = up
    metadata = {
        "format": "pt",
        "token": record.token,
        "class_name": record.class_name,
        "prompt": record.prompt,
        "rank": str(record.rank),
        "steps": str(record.steps),
        "loss": record.loss_name,
        "base": record.base,
        "base_hashes": json.dumps(record.base_hashes),
    }
    (folder / FILE_NAME).write_bytes(_ordered(save(tensors, metadata)))
    if merged:
        _write_merged(folder / "unet", trainer.networks.base, factors)
    write_json(folder / RECORD, asdict(record) | {"lora_sha256": sha256_of(folder / FILE_NAME)})


def _ordered(file: bytes) -> bytes:
    """A safetensors file with its metadata in order; the library writes them in a different order each time."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def _write_merged(folder: Path, base: BaseFiles, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The patched UNet with the LoRA added to its weights, float32, in diffusers' layout."""
    from safetensors.numpy import save_file

    state = dict(base.unet_patched_state())
    for name, (down, up) in factors.items():
        key = f"{name}.weight"
        state[key] = state[key] + (up @ down).numpy()
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", dict(base.configs["unet"]))


def _check(
    class_name: str, token: str, rank: int, steps: int | None, rate: float | None, seed: int, threads: int | None
) -> None:
    if not class_name:
        raise InputError("the class name is empty; say what the subject is, for example: mug")
    if not token or len(token.split()) != 1:
        raise InputError(f"the token {token!r} must be one word, for example: sks")
    if not 1 <= rank <= MOST_RANK:
        raise InputError(f"rank is {rank}; it must be 1 to {MOST_RANK}")
    if steps is not None and not 1 <= steps <= 100_000:
        raise InputError(f"steps is {steps}; it must be 1 to 100000")
    if rate is not None and not (math.isfinite(rate) and 0 < rate <= 1):
        raise InputError(f"learning rate is {rate}; it must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; it must be 0 to 2^63 - 1")
    if threads is not None and not 1 <= threads <= 1024:
        raise InputError(f"threads is {threads}; it must be 1 to 1024")


@contextmanager
def _torch_threads(count: int | None) -> Iterator[int]:
    """Use `count` threads for the block, then as many as before; gives the number in use."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("torch is not installed, training needs it: pip install dreammix-trt[train]") from error
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
