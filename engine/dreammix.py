"""The runtime's front door: load an engine directory, inpaint pictures with the subjects in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Unpack, cast

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.presets import Preset, fill_request
from dreammix_trt.core.removal import REMOVAL
from dreammix_trt.core.request import Request, RequestFields
from dreammix_trt.core.seam import BaseFacts, DeviceNetworks, Networks, Stream
from dreammix_trt.core.sources import Source
from dreammix_trt.core.store import Store
from dreammix_trt.core.subject import Subject, read_subject, write_subject
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.engine import kernels
from dreammix_trt.engine.backends.onnxruntime.engine_set import REBUILD, EngineSet
from dreammix_trt.engine.directory import OpenedEngine, check_runnable, open_engine
from dreammix_trt.engine.enrolment import Segment
from dreammix_trt.engine.host.denoiser import Denoiser
from dreammix_trt.engine.host.runtime import HostRuntime
from dreammix_trt.engine.imprint import Origin, find_version
from dreammix_trt.engine.jobs import Job, LaidOut, lay_out, paint_jobs
from dreammix_trt.engine.result import Result, StepEvent, read_request, save
from dreammix_trt.engine.retrieval import Retriever, retrieve
from dreammix_trt.engine.roster import Roster
from dreammix_trt.engine.runtime import Runtime
from dreammix_trt.engine.text import Tokenizer

if TYPE_CHECKING:
    from dreammix_trt.engine.device.memory_plan import Options
    from dreammix_trt.engine.device.studio import Studio
    from dreammix_trt.engine.drivers.device import Device

__all__ = ["DreamMix", "Job", "Result", "StepEvent", "read_request", "save"]

U8 = npt.NDArray[np.uint8]


class Closable(Protocol):
    """Something that its owner closes."""

    def close(self) -> None: ...


class DreamMix:
    """An engine ready to paint. Use it as a context manager, or call `close`; after that it raises EngineError.

    Not thread-safe: one request at a time per object. `another` makes a second object on the same GPU.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizers: Sequence[Tokenizer],
        subjects: Sequence[Subject] = (),
        *,
        defaults: Mapping[str, Any] | None = None,
        owned: Sequence[Closable] = (),
    ) -> None:
        """Paint with a runtime. `load` makes one from an engine directory.

        runtime: carries requests out.
        tokenizers: of both text encoders.
        subjects: what can be drawn; the first is the default.
        defaults: fields of `Request` for prompts given as text, where the caller does not set them (a few-step base:
            sampler, guidance_scale, num_inference_steps). None: those of the base's facts.
        owned: closed, in order, when this is closed.
        """
        self.runtime, self.facts = runtime, runtime.facts
        self.tokenizers = tuple(tokenizers)
        self.defaults = _check_defaults(getattr(self.facts, "defaults", {}) if defaults is None else defaults)
        self._owned, self._closed = tuple(owned), False
        self._origin = Origin(find_version())
        self._roster = Roster(runtime)
        for subject in subjects:
            self._roster.add(subject)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify: bool = False,
        store: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> DreamMix:
        """Load an engine directory that `dreammix-trt build` made.

        threads: for the networks and the kernels; None: all cores.
        verify: read every file again, instead of trusting what is remembered of large unchanged ones.
        store: where the base engines are, when not in the default place.
        device: "cpu", or "cuda": requests run on the GPU as a whole; for an engine of OpenVINO also what that calls its
            devices ("GPU", "AUTO"; "cpu" is its "CPU").
        options: with "cuda", those of `dreammix_trt.engine.Options` (pictures, largest_picture, subjects, ...).

        Raises InputError for device and options, EngineError with the fault and how to rebuild, MissingExtraError for
        packages that a GPU needs, DeviceError for a GPU that cannot be used, OutOfMemoryError with the memory plan.
        """
        given = _check_options(device, options)
        opened = open_engine(Path(path), verify=verify, store=Path(store) if store else None)
        check_runnable(Path(path), opened, device, verify=verify)
        tokenizers = [Tokenizer.load(opened.parts["base"] / name) for name in ("tokenizer", "tokenizer_2")]
        subjects = [read_subject(file) for file in opened.subjects]
        adapter = TokenAdapter.open(opened.adapter) if opened.adapter else None
        if device == "cuda":
            from dreammix_trt.engine.device.loading import open_device

            if threads is not None:
                kernels.set_threads(threads)
            gpu = open_device(opened, Path(store) if store else None)
            dm = cls.on_device(
                *(gpu.device, gpu.networks, tokenizers, subjects, given),
                stream=gpu.stream,
                adapter=adapter,
                owned=(gpu,),
            )
        else:
            networks = _open_host(opened, threads, Store(Path(store) if store else None), device)
            kernels.set_threads(networks.threads)
            dm = cls.on_host(networks, networks.facts, tokenizers, subjects, adapter=adapter, owned=(networks,))
        passport = opened.passport
        dm._origin = replace(dm._origin, base=str(passport.base.get("name", "")), base_key=passport.base_key)
        return dm

    @classmethod
    def on_host(
        cls,
        networks: Networks,
        facts: BaseFacts,
        tokenizers: Sequence[Tokenizer],
        subjects: Sequence[Subject] = (),
        *,
        denoiser: Denoiser | None = None,
        defaults: Mapping[str, Any] | None = None,
        adapter: TokenAdapter | None = None,
        owned: Sequence[Closable] = (),
    ) -> DreamMix:
        """Make a DreamMix on the host.

        networks: of a base.
        facts: about that base.
        denoiser: in place of the base's UNets.
        defaults: as for `DreamMix`.
        adapter: the base's token adapter, if it has one.
        """
        runtime = HostRuntime(networks, facts, denoiser, adapter)
        return cls(runtime, tokenizers, subjects, defaults=defaults, owned=(runtime, *owned))

    @classmethod
    def on_device(
        cls,
        device: Device,
        networks: DeviceNetworks,
        tokenizers: Sequence[Tokenizer],
        subjects: Sequence[Subject] = (),
        options: Options | None = None,
        *,
        stream: Stream | None = None,
        adapter: TokenAdapter | None = None,
        owned: Sequence[Closable] = (),
    ) -> DreamMix:
        """Make a DreamMix whose requests run on a device as a whole.

        options: what memory is set aside for.
        stream: where the networks must run, if it matters to them (`Studio`).
        adapter: the base's token adapter, if it has one.
        owned: closed, in order, when this is closed or cannot be made. Device and networks stay open unless listed
            here.
        """
        from dreammix_trt.engine.device.studio import Studio

        with ExitStack() as made:
            for each in reversed(owned):
                made.callback(each.close)
            studio = Studio(device, networks, options, stream, adapter=adapter)
            made.callback(studio.close)
            dm = cls(studio, tokenizers, subjects, owned=(studio, *owned))
            made.pop_all()
            return dm

    def another(self) -> DreamMix:
        """Make a second DreamMix on the same GPU, with the same weights but its own memory and stream.

        Both can be used at once, each by one thread. Close it before this one.

        Raises EngineError on the CPU, and where memory plan or back end forbid sharing the networks; OutOfMemoryError.
        """
        self._check_open()
        runtime = self.runtime.another()
        try:
            dm = DreamMix(runtime, self.tokenizers, self._roster.subjects, defaults=self.defaults, owned=(runtime,))
        except BaseException:
            runtime.close()
            raise
        dm._origin = self._origin
        return dm

    @property
    def studio(self) -> Studio | None:
        """Where requests run on a GPU, with its memory plan, timings and residents. None on the CPU."""
        return None if isinstance(self.runtime, HostRuntime) else cast("Studio", self.runtime)

    @property
    def networks(self) -> Any:
        """The base's networks."""
        return self.runtime.networks

    def close(self) -> None:
        """Release the networks. Any later use raises EngineError; closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as owned:
            for each in reversed(self._owned):
                owned.callback(each.close)

    def __enter__(self) -> DreamMix:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- subjects -----------------------------------------------------------------------------------------------------

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of the loaded subjects; the first is the default."""
        return self._roster.names

    def list_subjects(self) -> list[Subject]:
        """The loaded subjects with their words and attributes, each under the name that requests use."""
        return self._roster.subjects

    def add_subject(
        self,
        path: str | os.PathLike[str] | Subject,
        name: str | None = None,
        *,
        token: str | None = None,
        attributes: str | os.PathLike[str] | None = None,
    ) -> str:
        """Load another subject of the same base.

        path: a subject file, of a LoRA or of tokens, a LoRA (file or folder, from any trainer whose files `build
            --lora` takes), an engine directory with subjects in it, or a `Subject`.
        name: what requests call it; None: the file's name for it. It replaces a loaded subject of that name.
        token: its word in prompts; None: as the file says, else "sks".
        attributes: file of its attributes (attributes.json), for substitute="auto"; None: as the file says.

        Returns the name; of several subjects, the first one's. Raises FileFormatError when it does not fit this base or
        its token adapter, InputError where the name is that of a subject of the other kind.
        """
        self._check_open()
        if isinstance(path, Subject):
            return self._roster.add(path if token is None else replace(path, token=token), name or "")
        return self._roster.add_from(path, name, token, attributes)

    def enroll(
        self,
        image: Source | Sequence[Source],
        mask: Source | Sequence[Source | None] | None = None,
        *,
        class_name: str,
        name: str | None = None,
        segment: Segment | None = None,
        out: str | os.PathLike[str] | None = None,
    ) -> Subject:
        """Make a subject of one photograph, without training, and load it: its tokens stand beside the text.

        The base must have a token adapter (`build --tokens`). The subject needs no word in prompts: "a red mug". On a
        GPU it takes the place of a request: one that is under way cannot go on.

        image: of the object, as for `inpaint`; or several of the same object, whose cells are selected from together.
        mask: white where the object is, of the photograph's size; as many as photographs. None: what is opaque in the
            photograph, else what `segment` finds.
        class_name: what it is ("mug"); a prompt may name another class.
        name: what requests call it; None: its class. It replaces an enrolled subject of that name.
        segment: uint8 (H, W, 3) -> mask uint8 (H, W), or None where it sees nothing.
        out: also write the subject's file there.

        Raises InputError for a photograph without a mask, a mask that is empty or marks everything, a name of a LoRA's
        subject; EngineError for a base without an adapter.
        """
        self._check_open()
        subject = self._roster.enroll(image, mask, name, class_name, segment, self.tokenizers)
        if out is not None:
            write_subject(Path(out), subject)
        return subject

    def remove_subject(self, name: str) -> None:
        """Forget a subject and free what it takes. Where it was the default, the next one is.

        name: as `subjects` has it. Raises InputError for any other.
        """
        self._check_open()
        self._roster.remove(name)

    # -- requests -----------------------------------------------------------------------------------------------------

    def request(self, prompt: str, *, preset: Preset | None = None, **fields: Unpack[RequestFields]) -> Request:
        """Make the request of a prompt: `fields` first, then the preset's, the base's `defaults`, those of `Request`.

        preset: "fast", "balanced" or "best": as many steps as suit the base (`core.presets`); None: its defaults.
        """
        return fill_request(prompt, preset, self.defaults, fields)

    def inpaint(
        self,
        image: Source,
        mask_image: Source | None,
        prompt: str | Request,
        *,
        noise: NoiseProvider | Sequence[NoiseProvider] | None = None,
        retriever: Retriever = retrieve,
        prior_image: Source | None = None,
        keep_stages: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Result:
        """Paint the marked region (mask above 127) of a picture of any size.

        image, mask_image: path, PIL image, a file's bytes, open file, array or tensor (`core.pictures.read_image`), of
            equal size. What is transparent in the picture is never seen by a network; what is painted becomes visible.
            mask_image None: the mask is the picture's own transparency, and what is transparent is repainted.
        prompt: text, which makes a request as `request` does, or a whole Request, used as it is.
        noise: where the random numbers come from, one provider for each picture; default: the seed. Not on a GPU.
        retriever: finds the words of substitute="auto", in place of `retrieve`, which asks nobody.
        prior_image: what ASUKA's prior sees in place of the picture, of equal size: where it would copy a neighbour
            into the hole, a picture without that neighbour, or blank paper.
        keep_stages: whether the result has pictures of what each stage did.
        fields: any field of `Request` (seed, substitute, num_inference_steps, ...).

        Raises InputError that names the value at fault.
        """
        hooks: dict[str, Any] = {"noise": noise, "retriever": retriever, "prior_image": prior_image}
        return _take_last(self.iterate(image, mask_image, prompt, **hooks, keep_stages=keep_stages, **fields))

    def remove(
        self,
        image: Source,
        mask_image: Source | None,
        *,
        prior_image: Source | None = None,
        keep_stages: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Result:
        """Take out what the mask marks: a clean plate, from ASUKA's prior in place of a prompt and its decoder.

        The engine's base must have both (`build --asuka`). No guidance, no subject: a step costs half of a guided one.
        Arguments as for `inpaint`; fields that are given count more than those of `core.removal`.
        """
        request = self.request("", **REMOVAL).replace(**fields)
        return self.inpaint(image, mask_image, request, prior_image=prior_image, keep_stages=keep_stages)

    def inpaint_batch(self, jobs: Sequence[Job]) -> list[Result]:
        """Paint several requests. All are checked before the first is painted.

        jobs: (image, mask_image, request) each; `request(prompt, ...)` makes the request.

        The jobs of one subject at one strength are painted before those of the next, in the order in which subjects
        first come, so that each is merged into the weights once. On a GPU, those of equal frame and steps share a batch
        of up to `pictures`, whatever their prompts and sizes. On the CPU they are painted one after the other.

        Returns one result per job, in order. Raises InputError that names the value at fault.
        """
        laid_out = [self._lay_out(Job(*job)) for job in jobs]
        for _ in paint_jobs(self.runtime, laid_out, False, self._check_open):
            pass
        return [job.finished for job in laid_out if job.finished is not None]

    def iterate(
        self,
        image: Source,
        mask_image: Source | None,
        prompt: str | Request,
        *,
        noise: NoiseProvider | Sequence[NoiseProvider] | None = None,
        retriever: Retriever = retrieve,
        prior_image: Source | None = None,
        keep_stages: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Iterator[StepEvent]:
        """Like `inpaint`, but yield after each step. The last event has the result. Leaving the iteration cancels.

        Bad input is refused here, before the first step.
        """
        request = prompt.replace(**fields) if isinstance(prompt, Request) else self.request(prompt, **fields)
        job = self._lay_out(Job(image, mask_image, request, noise, retriever, prior_image))
        return paint_jobs(self.runtime, [job], keep_stages, self._check_open)

    def _lay_out(self, job: Job) -> LaidOut:
        self._check_open()
        return lay_out(job, self.runtime, self.tokenizers, self._roster.choose, self._origin)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this engine was closed: load it again with DreamMix.load, or use it before close()")


def _open_host(opened: OpenedEngine, threads: int | None, shelf: Store, device: str) -> EngineSet:
    """The networks of an engine on the host, on the back end that it was built for."""
    passport = opened.passport
    if passport.backend != "openvino":
        return EngineSet.load(opened.parts, threads, shelf)
    from dreammix_trt.engine.backends.openvino.engine_set import OpenVinoSet

    name = "CPU" if device == "cpu" else device
    return OpenVinoSet.open(opened.parts, threads, shelf, device=name, precision=passport.precision)


def _check_options(device: str, options: Mapping[str, Any]) -> Options:
    """The options of a device. Refuses unknown devices, options and values before anything is opened."""
    from dataclasses import fields

    from dreammix_trt.engine.device.memory_plan import Options

    plain = str(device).lower()
    if plain != device and plain in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}; write {plain!r}")
    if device not in ("cpu", "cuda") and not (isinstance(device, str) and device.isupper()):
        raise InputError(
            f"device is {device!r}; allowed: cpu, cuda (the first GPU; CUDA_VISIBLE_DEVICES=1 makes it another), or "
            "for an engine of OpenVINO what that calls it: GPU, AUTO"
        )
    known = [each.name for each in fields(Options)]
    for name in options:
        if name not in known:
            raise InputError(f"there is no option {name!r}; those of device='cuda' are {', '.join(known)}")
        if device != "cuda":
            raise InputError(f"{name} needs device='cuda' (`--device cuda`); omit it on the CPU")
    return Options(**options)


def _check_defaults(defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """A base's request defaults, as a read-only mapping. Raises EngineError when a request refuses one of them."""
    try:
        Request.of(**{"prompt": "", **defaults})
    except (InputError, TypeError) as error:
        raise EngineError(f"the base's request defaults cannot be used: {error}; {REBUILD}") from error
    return MappingProxyType(dict(defaults))


def _take_last(events: Iterator[StepEvent]) -> Result:
    for event in events:
        result = event.result
    assert result is not None
    return result
