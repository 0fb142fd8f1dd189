"""One recorded run: its settings as a request, its model as networks, its draws as noise, and our run of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dreammix_trt.core import fooocus, keymap
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.files import cache_home
from dreammix_trt.core.lora import Lora, Target, read_lora
from dreammix_trt.core.noise import ReplayNoise
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import RHO, SIGMA_MAX, SIGMA_MIN, Schedule
from dreammix_trt.core.seam import Networks
from dreammix_trt.core.store import Store
from dreammix_trt.core.subject import Subject, subject_from_loras
from dreammix_trt.core.tensors import Weights
from dreammix_trt.engine import kernels
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from dreammix_trt.engine.dreammix import DreamMix
from dreammix_trt.engine.host.sampling import StageInputs, Taken
from dreammix_trt.engine.text import Tokenizer

Array = npt.NDArray[Any]
BACKENDS = ("onnxruntime", "torch")
_TARGETS: dict[str, Target] = {"fooocus": "patched", "raw": "raw", "both": "both"}


class Case:
    """A folder with config.json, pictures and golden.npz. `arrays` remembers which of its arrays were looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with np.load(folder / "golden.npz") as file:
            self._arrays: dict[str, Array] = {name: file[name] for name in file.files}
        self.unread = set(self._arrays)
        labels = {name: name.split("_", 2)[2] for name in self._arrays if name.startswith("draw_")}
        drawn = {label: self._arrays[name] for name, label in labels.items()}
        self.noise = ReplayNoise({label: array for label, array in drawn.items() if array.ndim})
        # what only informs: the draws themselves (replayed), generator seeds, hashes of what passed through a network
        self.unread -= {*labels, "draws_json"}
        self._check_supported()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> Array:
        self.unread.discard(name)
        return self._arrays[name]

    def picture(self, name: str) -> Array | None:
        """A recorded PNG, uint8; None where the case has none."""
        file = self.folder / f"{name}.png"
        return _pixels(file) if file.is_file() else None

    def path(self, name: str) -> Path:
        """A file that the config names: beside the config, or in the folder above (loras)."""
        named = str(self.config.get(name, name))
        beside = self.folder / named
        return beside if beside.exists() else self.folder.parent / named

    @property
    def request(self) -> Request:
        """The config in our names; reference mode."""
        c = self.config
        steps = int(c["num_inference_steps"] * c["strength"])
        switch = c["isf_global_time"]
        resize = c.get("reference_resize") or _pixels(self.path("image")).shape[:2]
        return Request(
            prompt=c["prompt"],
            negative_prompt=c["negative_prompt"],
            substitute=tuple(c["sks_decompose_words"]) if c.get("tas_enabled", True) else (),
            substitute_prefix=c["decompose_prefix_prompt"],
            num_inference_steps=c["num_inference_steps"],
            strength=c["strength"],
            guidance_scale=c["guidance_scale"],
            guidance_rescale=c["guidance_rescale"],
            lcg_steps=switch if 0 <= switch < steps else steps,
            lcg_field=c["inpaint_respective_field"],
            gch_field=c["isf_global_ia"] if 0 < c["isf_global_ia"] <= 1 else 1.0,
            patched_fraction=c["fooocus_time"],
            sharpness=c["sharpness"],
            size_guidance_positive=c["adm_scaler_positive"],
            size_guidance_negative=c["adm_scaler_negative"],
            size_guidance_end=c["adm_scaler_end"],
            soft_blending=c["soft_blending"],
            vae_sample=c.get("vae_sample", True),
            seed=0,
            mode="reference",
            truncate_prompt=True,
            reference_resize=(int(resize[0]), int(resize[1])),
        )

    @property
    def base(self) -> BaseFiles:
        """The model with its patch; `patch_alpha` other than 1 weakens the patch."""
        biases, alpha = bool(self.config["patch_apply_biases"]), float(self.config.get("patch_alpha", 1.0))
        base = BaseFiles.open(self.path("model"), self.path("inpaint_patch"), self.path("inpaint_head"), biases)
        if alpha == 1:
            return base
        return WeakPatch(base.folder, base.patch, base.head_file, biases, base.configs, alpha)

    @property
    def subject(self) -> Subject:
        """Every LoRA of the case, each on its UNets, as one subject."""
        return subject_from_loras(self.loras(0), "golden", self._token)

    def loras(self, encoding: int) -> list[tuple[Lora, float, Target]]:
        """Each LoRA, read from one of its interchangeable files, with its scale and target."""
        found = []
        for entry in self.config["loras"]:
            files = entry["files"]
            lora = read_lora(self.path(files[min(encoding, len(files) - 1)]))
            found.append((lora, float(entry["scale"]), _TARGETS[entry["target"]]))
        return found

    @property
    def _token(self) -> str:
        """A word of the prompt, as our TAS insists on the subject's being there and the recorded one does not."""
        words = self.config["prompt"].lower().split()
        wanted = [*self.config["decompose_prefix_prompt"].lower().split()[-1:], "sks"]
        return next((word for word in (*wanted, *words) if word in words), "sks")

    def _check_supported(self) -> None:
        c = self.config
        karras = c.get("karras", {"sigma_max": SIGMA_MAX, "sigma_min": SIGMA_MIN, "rho": RHO})
        odd = [name for name in ("upscaler", "clip_skip") if c.get(name) is not None]
        if (karras["sigma_max"], karras["sigma_min"], karras["rho"]) != (SIGMA_MAX, SIGMA_MIN, RHO):
            odd.append("karras")
        if odd:
            raise SystemExit(f"{self.folder}: the runtime has no {', '.join(odd)} as this case's config.json asks for")


@dataclass(frozen=True)
class WeakPatch(BaseFiles):
    """A base whose patch is added with a weight."""

    alpha: float = 1.0

    def unet_patched_state(self) -> Weights:
        assert self.patch is not None
        names = keymap.sgm_to_diffusers(self.configs["unet"])
        patch = fooocus.read_patch(self.patch)
        return fooocus.apply_patch(self.state("unet"), patch, names, biases=self.patch_biases, alpha=self.alpha)


def networks_for(case: Case, backend: str, threads: int | None = None) -> Networks:
    """The case's model on a back end; its ONNX parts are exported once and kept beside the store."""
    base = case.base
    if backend == "torch":
        from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet

        if threads:
            import torch

            torch.set_num_threads(threads)
        return TorchEngineSet(base)
    from dreammix_trt.export import onnx_export
    from dreammix_trt.export.onnx_graph import exporter_versions

    code = b"".join(file.read_bytes() for file in sorted(Path(onnx_export.__file__).parent.glob("*.py")))
    parts = {
        "files": base.hash_contents(), "biases": base.patch_biases, "alpha": getattr(base, "alpha", 1.0),
        "exporter": exporter_versions(), "code": hashlib.sha256(code).hexdigest(),
    }  # fmt: skip
    shelf, key = Store(cache_home() / "golden"), Store.key(parts)
    if shelf.get(key) is None:
        with shelf.put(key, parts) as folder:
            if folder is not None:
                onnx_export.export_base(base, folder)
    found = shelf.get(key)
    assert found is not None
    return EngineSet.load(found, threads)


class Recorder:
    """Networks that remember every call."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self.calls: list[tuple[str, dict[str, Array], dict[str, Array]]] = []

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Any, ...]:
        return self._networks.slots(name)

    def weights(self, name: str) -> Mapping[str, Array]:
        return self._networks.weights(name)

    def run(self, name: str, **arrays: Any) -> dict[str, Array]:
        # copies: an output that is kept holds its place in the runtime's arena, which then grows by gigabytes
        outputs = {key: value.copy() for key, value in self._networks.run(name, **arrays).items()}
        self.calls.append((name, arrays, outputs))
        return outputs

    def of(self, *names: str) -> list[tuple[str, dict[str, Array], dict[str, Array]]]:
        """The calls of these networks, in order."""
        return [call for call in self.calls if call[0] in names]


@dataclass(frozen=True)
class Run:
    """What our run of a case did. stages: one or two; shown: the pictures of the hand-over and the result."""

    schedule: Schedule
    stages: list[StageInputs]
    taken: list[Taken]
    calls: Recorder
    shown: Mapping[str, Array]
    final: Array


def replay(case: Case, networks: Networks) -> Run:
    """Run the case end to end with its recorded noise."""
    recorder = Recorder(networks)
    base = case.base
    tokenizers = [Tokenizer.load(base.folder / name) for name in ("tokenizer", "tokenizer_2")]
    runtime = DreamMix.on_host(recorder, base, tokenizers, [case.subject])
    image, mask = pictures(case)
    stages: list[StageInputs] = []
    taken: list[Taken] = []
    for event in runtime.iterate(image, mask, case.request, noise=case.noise, keep_stages=True):
        taken.append(event.taken)
        if not stages or stages[-1] is not event.taken.stage:
            stages.append(event.taken.stage)
    result = event.result
    assert result is not None
    shown = {name: np.asarray(picture) for name, picture in result.stages.items()}
    return Run(result.schedule, stages, taken, recorder, shown, np.asarray(result.images[0]))


def pictures(case: Case) -> tuple[Array, Array]:
    """Image (H, W, 3) and mask (H, W), uint8; where their sizes differ, both stretched as step 1 does."""
    image, mask = _pixels(case.path("image"), "RGB"), _pixels(case.path("mask"), "L")
    if image.shape[:2] != mask.shape:
        size = case.request.reference_resize or image.shape[:2]
        image, mask = (kernels.resize(array, size[0], size[1], "bicubic") for array in (image, mask))
    return image, mask


def _pixels(file: Path, mode: str | None = None) -> Array:
    with Image.open(file) as image:
        return np.array(image.convert(mode) if mode else image)


def find_cases(folder: Path, wanted: Sequence[str] = ()) -> list[Case]:
    """The cases of a folder in the golden format, or those of them that are wanted."""
    names = sorted(file.parent.name for file in folder.glob("*/golden.npz"))
    lacking = [name for name in wanted if name not in names]
    if lacking or not (names or (folder / "units.npz").is_file()):
        held = ", ".join(names) or "nothing"
        raise SystemExit(f"{folder}: no case {', '.join(lacking) or 'at all'}; it holds {held}")
    return [Case(folder / name) for name in names if not wanted or name in wanted]
