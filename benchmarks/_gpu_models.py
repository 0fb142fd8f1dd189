"""What the parts of `gpu_suite.py` run: the device, networks, subjects, the runtime's front, one step by itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _gpu_clock import array, download, upload
from _sdxl_files import sdxl_configs, write_tokenizers

if TYPE_CHECKING:
    from dreammix_trt.core.request import Request
    from dreammix_trt.core.seam import Array, DeviceNetworks, Stream
    from dreammix_trt.core.subject import Subject
    from dreammix_trt.engine.device.slot_layout import Pristine
    from dreammix_trt.engine.drivers.device import Device

CHANNELS = 4
PROMPT = "a red striped mug on a table"
TOKENS = "+tokens"  # names a subject of tokens, or what stands beside a LoRA
#: whole pictures: what their requests say
JOBS: tuple[Mapping[str, Any], ...] = (
    {"num_inference_steps": 30, "guidance_scale": 4.0},
    {"num_inference_steps": 8, "guidance_scale": 1.0, "sampler": "lcm"},
)


@dataclass(frozen=True)
class Setting:
    """What the command line says. width: of the SDXL model, 1 is SDXL itself; side: of frames in pixels; steps: of
    each job (None: the job's own); repeats: of whole pictures; requests: of the soak; swaps: of subjects; compiled:
    torch.compile, too, in compile_mode; simulate: on the host, without a GPU, labelled so; engine: a directory to time.
    """

    width: float = 1.0
    side: int = 1024
    steps: int | None = None
    repeats: int = 5
    requests: int = 1000
    swaps: int = 1000
    compiled: bool = True
    compile_mode: str = "default"
    simulate: bool = False
    engine: str | None = None

    @property
    def torch_device(self) -> str:
        return "cpu" if self.simulate else "cuda"

    @property
    def dtype(self) -> str:
        """Of full-size networks."""
        return "float32" if self.simulate else "float16"

    def jobs(self) -> dict[str, dict[str, Any]]:
        """The whole pictures to paint: what is said of each -> fields of its request."""
        own = {} if self.steps is None else {"num_inference_steps": self.steps}
        found = [{**fields, **own} for fields in JOBS]
        return {f"{job['num_inference_steps']} steps, guidance {job['guidance_scale']:g}": job for job in found}


@contextmanager
def device_of(setting: Setting) -> Iterator[Device]:
    """The GPU, or the simulated device."""
    if setting.simulate:
        from dreammix_trt.engine.drivers.simulated import SimulatedDevice

        with SimulatedDevice() as simulated:
            yield simulated
        return
    from dreammix_trt.engine.drivers.cuda import CudaDevice

    device = CudaDevice()
    try:
        yield device
    finally:
        device.close()


def plain_float32() -> None:
    """Let torch compute float32 products in float32, as the host does."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


# ------------------------------------------------------------------------------------------------ networks


def configs_of(setting: Setting) -> dict[str, dict[str, Any]]:
    """SDXL's configurations at the setting's width; simulated, as shallow as can be."""
    return sdxl_configs(setting.width, depth=1 if setting.simulate else None, side=setting.side)


@contextmanager
def random_networks(setting: Setting, device: Device, *, compiled: bool = False) -> Iterator[Any]:
    """SDXL with random weights made on the device, patched, slots' weights as inputs: `TorchNetworks`."""
    from dreammix_trt.export.torch_backend.on_device import TorchNetworks

    configs = {name: config for name, config in configs_of(setting).items() if name != "scheduler"}
    options: dict[str, Any] = {
        "device": setting.torch_device,
        "dtype": setting.dtype,
        "compile": compiled and setting.compile_mode,
    }
    with TorchNetworks.random(configs, **options) as networks:
        yield on_device(setting, device, networks)


def on_device(setting: Setting, device: Device, networks: Any) -> Any:
    """Torch networks as the device takes them."""
    return RecordedNetworks(device, networks) if setting.simulate else networks


class RecordedNetworks:
    """Networks on the CPU whose passes are work of a simulated device, so that it can capture and replay them."""

    def __init__(self, device: Device, networks: Any) -> None:
        self._device, self._networks = device, networks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._networks, name)

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def bind(self, name: str, *arguments: Any, **named: Any) -> Any:
        """As the networks do."""
        return RecordedBound(self._device, name, self._networks.bind(name, *arguments, **named))


class RecordedBound:
    """What `RecordedNetworks` binds."""

    capturable = True

    def __init__(self, device: Device, name: str, bound: Any) -> None:
        self._device, self._name, self._bound = device, name, bound

    def enqueue(self, stream: Stream) -> None:
        """Put one pass into the stream."""
        self._device.enqueue_work(self._name, stream, lambda: self._bound.enqueue(stream))

    def close(self) -> None:
        """As the networks' own."""
        self._bound.close()


def tokenizers_of(setting: Setting) -> tuple[Any, ...]:
    """Two tokenizers with exactly the text encoders' vocabulary."""
    from dreammix_trt.engine.text import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizers(Path(folder), configs_of(setting))
        return tuple(Tokenizer.load(Path(folder) / name) for name in ("tokenizer", "tokenizer_2"))


def random_subject(networks: DeviceNetworks, name: str, *, seed: int, rank: int = 4) -> Subject:
    """Factors of every slot of the patched UNet and of what attends for it, some percent of a layer's output."""
    from dreammix_trt.core.networks import networks_of_factors
    from dreammix_trt.core.subject import Subject

    rng = np.random.default_rng(seed)

    def pair(slot: Any) -> tuple[Any, Any]:
        a = rng.standard_normal((slot.inputs, rank), np.float32) * np.float32(slot.inputs**-0.5)
        return a, rng.standard_normal((rank, slot.outputs), np.float32) * np.float32(0.03)

    slots = [slot for each in networks_of_factors("unet") if each in networks for slot in networks.slots(each)]
    return Subject(name, "sks", "mug", {"unet": {slot.module: pair(slot) for slot in slots}})


def sample_picture(side: int) -> tuple[Any, Any]:
    """Smooth waves with noise (side, side, 3) and an ellipse to repaint (side, side): uint8."""
    y, x = np.mgrid[0:side, 0:side]
    waves = np.stack([np.sin(x / 37 + y / 91 + c) for c in range(3)], axis=-1) * 90 + 128
    noise = np.random.default_rng(0).normal(0, 20, waves.shape)
    inside = ((y - side * 0.5) / (side * 0.25)) ** 2 + ((x - side * 0.5) / (side * 0.2)) ** 2 < 1
    return (waves + noise).clip(0, 255).astype(np.uint8), np.where(inside, np.uint8(255), np.uint8(0))


# ------------------------------------------------------------------------------------------------ the runtime


class Front:
    """A studio and what a request needs around it: pictures and a request in, a picture out."""

    def __init__(self, studio: Any, tokenizers: Sequence[Any]) -> None:
        self.studio, self.tokenizers = studio, tokenizers

    def paint(self, image: Any, mask: Any, request: Request, *, subject: str = "") -> Any:
        """The finished picture, uint8 (H, W, 3)."""
        return self.paint_batch([(image, mask, request, subject)])[0]

    def paint_batch(self, wanted: Sequence[tuple[Any, Any, Request, str]]) -> list[Any]:
        """Several pictures as one batch."""
        *_, painted = self.studio.paint(self.works(wanted))
        return [picture.pixels for picture in painted]

    def works(self, wanted: Sequence[tuple[Any, Any, Request, str]]) -> list[Any]:
        """What the studio is given of these pictures."""
        from dreammix_trt.core.schedule import make_schedule
        from dreammix_trt.core.subject import Role
        from dreammix_trt.engine.jobs import lay_canvas
        from dreammix_trt.engine.prompts import plan_prompts
        from dreammix_trt.engine.runtime import Work

        works = []
        for image, mask, request, subject in wanted:
            canvas = lay_canvas(image, mask, request, self.studio.facts, self.studio.frames)
            schedule = make_schedule(request, raw_unet=self.studio.has_raw_unet)
            role = Role(subject)
            prompts = plan_prompts(self.tokenizers, request, role, "sks", contexts=self.studio.contexts)
            works.append(Work(canvas, request, schedule, request.seed or 0, role, prompts))
        return works

    @property
    def timings(self) -> dict[str, float]:
        """Device seconds of the last batch by phase."""
        return dict(self.studio.timings)

    def plan_for(self, total: int) -> Any:
        """The memory plan on a device of `total` bytes of which others hold as much as here."""
        from dreammix_trt.engine.device.arena import measure_regions
        from dreammix_trt.engine.device.memory_plan import plan_memory

        plan, needs = self.studio.plan, self.studio.needs
        taken = measure_regions(needs.shared)
        workspace = taken.pop("workspace")
        usable = total - (plan.total - plan.free)
        options = self.studio.options
        return plan_memory(
            self.studio.networks, usable, total, options, taken, workspace, slotted=needs.slotted, loaded=()
        )


@contextmanager
def studio_for(
    device: Device,
    networks: Any,
    tokenizers: Sequence[Any],
    subjects: Sequence[Subject] = (),
    stream: Stream | None = None,
    **options: Any,
) -> Iterator[Front]:
    """The device runtime over these networks; stream: where they must run; options: of `engine.Options`."""
    from dreammix_trt.engine.device.memory_plan import Options
    from dreammix_trt.engine.device.studio import Studio

    with Studio(device, networks, Options(**options), stream) as studio:
        for subject in subjects:
            studio.add_subject(subject.name, subject)
        yield Front(studio, tokenizers)


# ------------------------------------------------------------------------------------------------ one step


class StepRig:
    """One step of a batch by itself, bound to memory of its own: the two kernels and the UNet between them.

    Its memory holds random values; every row of its schedule is the same middle one of thirty steps. `slot_bytes` are
    the regions of slots' weights: merged ("unet slots"), and the base's own where they are on the device.
    """

    def __init__(
        self,
        device: Device,
        networks: DeviceNetworks,
        latent: tuple[int, int],
        *,
        pictures: int = 1,
        rows: int = 2,
        subjects: Sequence[Subject] = (),
        pristine: Pristine = "device",
        stream: Stream | None = None,
        reading: Subject | None = None,
        context: int = 77,
    ) -> None:
        """latent: height and width; rows: a picture, 2 with guidance; pristine: where the base's own slot weights are;
        stream: where the networks must run; reading: what a token adapter adds;
        context: rows of the condition."""
        from dreammix_trt.core.axes import Sides

        self.device, self.pictures, self.rows, self.latent = device, pictures, rows, latent
        self._owned = ExitStack()
        try:
            self.stream: Stream = stream or device.make_stream()
            if stream is None:
                self._owned.callback(self.stream.close)
            self.sides = Sides(pictures * rows, pictures, *latent, context)
            self.weights = self._make_weights(networks, max(len(subjects), 1), pristine, reading)
            for subject in subjects:
                self.weights.add(subject.name, subject)
            self.arrays = self._arrays(networks)
            self._state = self._states()
            size = networks.workspace_bytes("unet", self.sides)
            workspace = array(device, self._owned, (max(size, 256),), "uint8")
            self.bound = networks.bind("unet", self.sides, self.arrays, workspace)
            self._owned.callback(self.bound.close)
            self.reset()
        except BaseException:
            self._owned.close()
            raise

    def enter(self, name: str) -> None:
        """Let the UNet, and what attends for it, hold a subject's weights; "": the base's own.

        `TOKENS` is a subject of tokens, behind another name one beside that subject.
        """
        from dreammix_trt.core.networks import networks_of_factors
        from dreammix_trt.core.subject import Role

        role = Role(name.removesuffix(TOKENS), adapted=name.endswith(TOKENS))
        self.weights.enter(self.weights.choose(role), networks_of_factors("unet"))

    def unet(self) -> None:
        """Enqueue the network alone."""
        self.bound.enqueue(self.stream)

    def around(self) -> None:
        """Enqueue what a step does outside the UNet."""
        self._before()
        self._after()

    def step(self) -> None:
        """Enqueue one whole step, in the runtime's order."""
        self._before()
        self.unet()
        self._after()

    def reset(self) -> None:
        """Random inputs and state again, always the same; the counter at 0."""
        rng = np.random.default_rng(1)
        for name, each in {**self.arrays, **self._state}.items():
            if name in self.weights.arrays("unet") or name in ("scratch", "table", "jobs"):
                continue
            values = _random(rng, name, each.shape).astype(each.dtype)
            upload(self.device, self.stream, each, values)

    def capture(self, record: Callable[[], None]) -> Any:
        """A graph of what `record` enqueues, run once before; None where the network cannot be captured."""
        record()
        self.device.synchronize(self.stream)
        return self.device.capture(self.stream, record) if self.bound.capturable else None

    def result(self) -> dict[str, Any]:
        """x, x0 and eps as they stand, waited for."""
        where = {"x": self._state["x"], "x0": self._state["x0"], "eps": self.arrays["eps"]}
        return {name: download(self.device, self.stream, each) for name, each in where.items()}

    def close(self) -> None:
        """Free everything; the device must be idle."""
        self.device.synchronize(self.stream)
        self._owned.close()

    def __enter__(self) -> StepRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_weights(
        self, networks: DeviceNetworks, subjects: int, pristine: Pristine, reading: Subject | None
    ) -> Any:
        from dreammix_trt.core.networks import networks_of_factors
        from dreammix_trt.engine.device import slot_layout
        from dreammix_trt.engine.device.arena import Arena
        from dreammix_trt.engine.device.pace import Pace
        from dreammix_trt.engine.device.transfers import Uploads
        from dreammix_trt.engine.device.weights import DeviceWeights

        mine = networks_of_factors("unet")
        slotted = {name: each for name, each in slot_layout.list_slotted(networks).items() if name in mine}
        self.slot_bytes = slot_layout.measure_weights(slotted, turns=False, pristine=pristine)
        tables = slot_layout.list_tables(slotted, subjects, reading)
        regions = tables | {name: ((size,), "uint8") for name, size in self.slot_bytes.items()}
        arena = Arena(self.device, regions)
        self._owned.callback(arena.close)
        uploads = Uploads(self.device, self.stream, Pace(self.device, self.stream).wait_for, self._owned)
        return DeviceWeights(
            *(self.device, self.stream, networks, slotted, arena, uploads),
            turns=False,
            pristine=pristine,
            reading=reading,
        )

    def _arrays(self, networks: DeviceNetworks) -> dict[str, Array]:
        merged = dict(self.weights.arrays("unet"))
        own = {
            tensor.name: array(self.device, self._owned, self.sides.shape(tensor), tensor.dtype)
            for tensor in (*networks.inputs("unet"), *networks.outputs("unet"))
            if tensor.name not in merged
        }
        return own | merged

    def _states(self) -> dict[str, Array]:
        from dreammix_trt import _cpp
        from dreammix_trt.core.request import Request
        from dreammix_trt.core.schedule import make_schedule
        from dreammix_trt.core.seam import BaseFacts
        from dreammix_trt.engine.device.blocks import MOST_STEPS, make_steps
        from dreammix_trt.engine.device.records import JOB, STEP

        height, width = self.latent
        latents = (self.pictures, CHANNELS, height, width)
        scratch = _cpp.gpu.step_scratch(pictures=self.pictures, channels=CHANNELS, height=height, width=width)
        shapes = {
            **{name: (latents, "float32") for name in ("x", "x0", "x_in", "background")},
            "mask": ((self.pictures, 1, height, width), "float32"), "counter": ((1,), "int32"),
            "flags": ((self.pictures,), "int32"), "scratch": ((int(scratch),), "uint8"),
            "table": ((self.pictures, MOST_STEPS, STEP.itemsize), "uint8"),
            "jobs": ((self.pictures, JOB.itemsize), "uint8"),
        }  # fmt: skip
        found = {name: array(self.device, self._owned, shape, dtype) for name, (shape, dtype) in shapes.items()}
        side = 8 * max(height, width)
        facts = BaseFacts(native_side=side, divisor=8, scaling_factor=1.0, feature_channels=1)
        rows = make_steps(make_schedule(Request(prompt=PROMPT, num_inference_steps=30)), (8 * height, 8 * width), facts)
        row, jobs = rows[12:13], np.zeros(self.pictures, JOB)
        jobs["seed"] = np.arange(self.pictures)
        upload(self.device, self.stream, found["table"], np.broadcast_to(row, (self.pictures, MOST_STEPS)))
        upload(self.device, self.stream, found["jobs"], jobs)
        return found

    def _before(self) -> None:
        told = _same(self.arrays, "timestep", "time_ids")
        self._kernel("step_before", **self._common(), network_in=self.arrays["sample"], **told)

    def _after(self) -> None:
        state = _same(self._state, "x0", "scratch", "flags")
        self._kernel("step_after", **self._common(), eps=self.arrays["eps"], **state, bit=4)

    def _common(self) -> dict[str, Any]:
        from dreammix_trt.engine.device.blocks import MOST_STEPS

        shared = _same(self._state, "counter", "table", "jobs", "x", "background", "mask", "x_in")
        return shared | {
            "most_steps": MOST_STEPS,
            "pictures": self.pictures,
            "channels": CHANNELS,
            "height": self.latent[0],
            "width": self.latent[1],
            "rows_per_picture": self.rows,
            "half": self.arrays["sample"].half,
        }

    def _kernel(self, name: str, **arguments: Any) -> None:
        self.device.launch_kernel(name, self.stream, **arguments)


def _same(arrays: Mapping[str, Array], *names: str) -> dict[str, Array]:
    return {name: arrays[name] for name in names}


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Any:
    if name in ("counter", "flags"):
        return np.zeros(shape)
    if name == "mask":
        return rng.standard_normal(shape) > 0
    if name == "timestep":
        return np.full(shape, 500.0)
    if name == "time_ids":
        return np.full(shape, 1024.0)
    return rng.standard_normal(shape)
