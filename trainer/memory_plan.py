"""How much memory a training needs, calculated from a base's configs before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final, Literal

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import size_text

if TYPE_CHECKING:
    from dreammix_trt.trainer.meta_step import StepCost, Weights

GIB: Final = 1 << 30
#: assumed, not calculated: what CUDA, cuDNN and cuBLAS keep; work space of convolutions and rounding by the allocator
CONTEXT: Final = 600 << 20
WORKSPACE: Final = 512 << 20
#: an RTX 4090's dense products with float32 sums, by NVIDIA's table
PEAK_FLOPS: Final = {"bfloat16": 165e12, "float16": 165e12, "float32": 82.6e12}
#: the assumed share of it that a step reaches: products at 70 % of the peak and all else at 80 % of the memory's speed
#: would give 0.42 (docs/training-memory.md)
SHARE: Final = 0.4
_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_OPTIMIZERS: Final = ("adamw", "adamw8bit")
#: bitsandbytes: smaller tensors keep 32-bit states; a block of values shares a float32 scale
_LEAST_8BIT, _BLOCK = 4096, 256
#: a CPU has no context, and needs little beside tensors
_RESERVES: Final = {"cuda": (CONTEXT, WORKSPACE), "cpu": (0, 64 << 20)}


@dataclass(frozen=True)
class Settings:
    """What a plan is made for.

    precision: of the frozen weights and, where it is not float32, of autocast's products.
    batch: pictures in a forward and backward pass.
    accumulate: passes for one step of the optimizer.
    rank: of the LoRA.
    checkpointing: whether blocks are computed again in the backward pass.
    optimizer: "adamw" or "adamw8bit".
    side: of the pictures in pixels.
    """

    precision: str
    batch: int
    accumulate: int
    rank: int
    checkpointing: bool
    optimizer: str
    side: int

    def describe(self) -> str:
        """In a line."""
        checkpointing = "checkpointing" if self.checkpointing else "no checkpointing"
        return (
            f"{self.side}x{self.side}, batch {self.batch} x {self.accumulate}, {self.precision}, rank {self.rank}, "
            f"{checkpointing}, {self.optimizer}"
        )


@dataclass(frozen=True)
class TrainingPlan:
    """What a training takes, in bytes. Calculated; nothing of it is measured.

    base, settings: that it is made for.
    unet: the frozen weights.
    factors, gradients, states: of the LoRA, float32, and of the optimizer.
    activations: what the forward pass keeps for the backward pass.
    temporary: what comes and goes on top of that.
    vae, vae_values: the VAE's weights, and what lives while it encodes one picture, both float32.
    text: the text encoders' weights, float32.
    workspace, context: assumed.
    trained: how many numbers are trained.
    flops: of one step of the optimizer, on all pictures of its batches.
    """

    base: BaseFiles = field(repr=False)
    settings: Settings
    unet: int
    factors: int
    gradients: int
    states: int
    activations: int
    temporary: int
    vae: int
    vae_values: int
    text: int
    workspace: int
    context: int
    trained: int
    flops: int

    @property
    def training_bytes(self) -> int:
        """While steps are taken."""
        own = self.unet + self.factors + self.gradients + self.states + self.activations + self.temporary
        return own + self.workspace + self.context

    @property
    def encoding_bytes(self) -> int:
        """Before, while photographs and captions are encoded; text encoders, VAE and UNet are never there together."""
        return max(self.text, self.vae + self.vae_values + self.workspace) + self.context

    @property
    def total_bytes(self) -> int:
        """The most at any time."""
        return max(self.training_bytes, self.encoding_bytes)

    def minutes(self, steps: int) -> float:
        """Minutes that so many steps take on an RTX 4090 at the assumed share of its peak; calculated, not measured."""
        return self.flops * steps / (PEAK_FLOPS[self.settings.precision] * SHARE) / 60

    def lines(self, steps: int = 1000) -> list[str]:
        """Rows for people; steps: whose time is told."""
        settings = self.settings
        rows = [
            (f"UNet, frozen, {settings.precision}", self.unet),
            (f"LoRA, {self.trained:,} numbers, float32", self.factors),
            ("their gradients, float32", self.gradients),
            (f"the optimizer's states ({settings.optimizer})", self.states),
            ("values kept for the backward pass", self.activations),
            ("the largest values that come and go", self.temporary),
            ("work space and rounding, assumed", self.workspace),
            ("CUDA and its libraries, assumed", self.context),
            ("training, together", self.training_bytes),
            ("before it, encoding photographs and captions", self.encoding_bytes),
        ]
        width = max(len(name) for name, _ in rows)
        speed = f"{PEAK_FLOPS[settings.precision] / 1e12:.0f} TFLOP/s at {SHARE:.0%}"
        return [
            f"Memory plan, calculated, not measured: {settings.describe()}",
            *(f"  {name:<{width}}  {size_text(size):>9}" for name, size in rows if size),
            f"  A step computes {self.flops / 1e12:.3g} TFLOP; {steps:,} steps: {self.minutes(steps):.1f} minutes on "
            f"an RTX 4090 ({speed} assumed), calculated, not measured",
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the record of a training."""
        parts = [each.name for each in fields(self) if each.name not in ("base", "settings")]
        totals = ("training_bytes", "encoding_bytes", "total_bytes")
        told = {name: getattr(self, name) for name in (*parts, *totals)}
        return {"settings": asdict(self.settings), **told, "measured": False}

    def check(self, free_bytes: int) -> None:
        """Raise InputError when a GPU is too small; it says which settings fit, or that none do.

        free_bytes: as CUDA tells it, which is after its context was made.
        """
        needed = self.total_bytes - self.context
        if needed <= free_bytes:
            return
        told = (
            f"this training needs {size_text(needed)} of the GPU's memory, by calculation, and {size_text(free_bytes)}"
        )
        words = "these settings"
        for settings, words in _list_remedies(self.settings):
            plan = _plan(self.base, settings)
            needed = plan.total_bytes - plan.context
            if needed <= free_bytes:
                raise InputError(f"{told} are free; with {words} it needs {size_text(needed)}")
        raise InputError(
            f"{told} are free; with {words} it still needs {size_text(needed)}: end other programs that use the GPU, "
            "take a smaller base, or a larger GPU"
        )


def plan_training(
    base: BaseFiles,
    *,
    precision: Literal["float32", "bfloat16", "float16"] | str,
    batch: int,
    accumulate: int,
    rank: int,
    checkpointing: bool,
    optimizer: Literal["adamw", "adamw8bit"] | str,
    side: int,
    device: str = "cuda",
) -> TrainingPlan:
    """Calculate what a training takes. Reads the base's configs alone; needs torch, diffusers and peft.

    precision, batch, accumulate, rank, checkpointing, optimizer, side: as `Settings` has them. The side is a multiple
        of the base's divisor.
    device: "cuda" or "cpu"; a CPU has no context, and its autocast leaves norms in the products' type.

    Raises InputError for a value that no training can have.
    """
    if precision not in _BYTES:
        raise InputError(f"precision is {precision!r}; choose one of {', '.join(_BYTES)}")
    if optimizer not in _OPTIMIZERS:
        raise InputError(f"optimizer is {optimizer!r}; choose one of {', '.join(_OPTIMIZERS)}")
    for name, value in (("batch", batch), ("accumulate", accumulate), ("rank", rank)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be 1 or more")
    if side < base.divisor or side % base.divisor:
        raise InputError(f"side is {side}; it must be a multiple of {base.divisor}")
    settings = Settings(precision, batch, accumulate, rank, checkpointing, optimizer, side)
    return _plan(base, settings, device)


def _plan(base: BaseFiles, settings: Settings, device: str = "cuda") -> TrainingPlan:
    kind = device.partition(":")[0]
    configs = {name: dict(base.configs[name]) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    cost, weights = _count_step(
        _frozen(configs["unet"]), settings.precision, settings.rank, settings.side, settings.checkpointing, kind
    )
    vae, vae_values, text = _count_encoding(_frozen(configs), settings.side)
    trained = sum(weights.trained)
    context, workspace = _RESERVES[kind]
    return TrainingPlan(
        base,
        settings,
        unet=weights.frozen,
        factors=4 * trained,
        gradients=4 * trained,
        states=sum(_bytes_of_states(count, settings.optimizer) for count in weights.trained),
        activations=settings.batch * cost.kept,
        temporary=settings.batch * (cost.peak - cost.kept),
        vae=vae,
        vae_values=vae_values,
        text=text,
        workspace=workspace,
        context=context,
        trained=trained,
        flops=settings.batch * settings.accumulate * cost.flops,
    )


def _bytes_of_states(count: int, optimizer: str) -> int:
    """The two moments of one tensor of so many values."""
    if optimizer == "adamw8bit" and count >= _LEAST_8BIT:
        return 2 * (count + 4 * -(-count // _BLOCK))
    return 8 * count


def _list_remedies(settings: Settings) -> Iterator[tuple[Settings, str]]:
    """Gentler settings and the options that choose them: each alone, then two together, and so on."""
    changes: list[tuple[dict[str, Any], str]] = []
    if _BYTES[settings.precision] > 2:
        changes.append(({"precision": "bfloat16"}, "--precision bfloat16"))
    if not settings.checkpointing:
        changes.append(({"checkpointing": True}, "--gradient-checkpointing on"))
    if settings.batch > 1:
        accumulate = settings.batch * settings.accumulate
        changes.append(({"batch": 1, "accumulate": accumulate}, f"--batch 1 --accumulate {accumulate}"))
    if settings.optimizer == "adamw":
        changes.append(({"optimizer": "adamw8bit"}, "--optimizer adamw8bit"))
    for count in range(1, len(changes) + 1):
        for chosen in combinations(changes, count):
            changed = {name: value for change, _ in chosen for name, value in change.items()}
            yield replace(settings, **changed), " ".join(words for _, words in chosen)


# -- counted once -----------------------------------------------------------------------------------------------------

Frozen = tuple[Any, ...]


def _frozen(value: Any) -> Any:
    """JSON values as something that can be a key."""
    if isinstance(value, dict):
        return ("dict", tuple((name, _frozen(each)) for name, each in value.items()))
    return ("list", tuple(map(_frozen, value))) if isinstance(value, list | tuple) else ("value", value)


def _thawed(value: Frozen) -> Any:
    kind, held = value
    if kind == "dict":
        return {name: _thawed(each) for name, each in held}
    return [_thawed(each) for each in held] if kind == "list" else held


@lru_cache(maxsize=32)
def _count_step(
    config: Frozen, precision: str, rank: int, side: int, checkpointing: bool, kind: str
) -> tuple[StepCost, Weights]:
    from dreammix_trt.trainer.meta_step import count_step

    products = None if precision == "float32" else precision
    return count_step(_thawed(config), precision, rank, side, checkpointing=checkpointing, products=products, kind=kind)


@lru_cache(maxsize=8)
def _count_encoding(configs: Frozen, side: int) -> tuple[int, int, int]:
    from dreammix_trt.trainer.meta_step import count_encoding

    return count_encoding(_thawed(configs), side)
