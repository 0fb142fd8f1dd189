"""Builds of the embedded base: by reference, self-contained and merged; second subjects; what does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dreammix_trt.building import Defaults, EngineOptions, build
from dreammix_trt.building.ingredients import Ingredients
from dreammix_trt.core.checkpoint import EMBEDDED_LCM, BaseFiles
from dreammix_trt.core.errors import EngineError, FileFormatError, InputError
from dreammix_trt.core.files import folder_bytes, write_json
from dreammix_trt.core.passport import Passport
from dreammix_trt.core.slots import slots_of
from dreammix_trt.core.store import Store
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.directory import check_engine
from tests.conftest import write_lora

IMAGE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (96, 96, 3), np.uint8))
MASK = Image.fromarray(np.pad(np.full((40, 40), 255, np.uint8), 28))


def picture(engine: Path, **fields: object) -> np.ndarray:  # type: ignore[type-arg]
    with DreamMix.load(engine, threads=1) as dm:
        return np.asarray(dm.inpaint(IMAGE, MASK, "a sks mug", num_inference_steps=4, seed=3, **fields).images[0])


def parts_of(passport: Passport, store: Path | None = None) -> dict[str, Path]:
    folders = {name: Store(store).get(key) for name, key in passport.parts.items()}
    return {name: folder for name, folder in folders.items() if folder is not None}


def weights_of(passport: Passport, name: str) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """A part's weights by torch name, as torch has them; those of slots lie in a file of their own."""
    folder = parts_of(passport)[name]
    entry = json.loads((folder / "network.json").read_text())
    held = load_file(folder / entry["weights"])
    plain = {key: held[key].T if turned else held[key] for key, turned in entry["initializers"].items()}
    slots = load_file(folder / entry["slot_weights"]) if "slot_weights" in entry else {}
    return plain | {
        f"{slot.module}.weight": slot.view(slots[slot.weight]).T for slot in slots_of(entry) if slot.weight in slots
    }


def test_the_passport_says_what_the_engine_was_made_from(mug_engine: Path, mug_lora: Path) -> None:
    passport = Passport.read(mug_engine)
    assert [subject.name for subject in passport.subjects] == ["mug"]
    assert passport.subjects[0].source == str(mug_lora)
    assert "unet/diffusion_pytorch_model.safetensors" in passport.base["files"]
    assert {"unet", "unet_raw", "vae_decoder", "text_encoder_2"} <= {entry.name for entry in passport.networks}
    for entry in passport.networks:
        assert entry.parity["max_rel"] < 1e-4
        assert not [name for name in entry.inputs if name.endswith((".key", ".value", ".weight"))], "hundreds in SDXL"
    assert passport.parts.keys() == {"base", *(entry.name for entry in passport.networks)}
    assert (passport.backend, passport.precision, passport.targets) == ("onnxruntime", "float32", [])
    assert passport.backend_version == passport.versions["onnxruntime"]
    assert passport.files["unet/unet.onnx"] == passport.files["unet_raw/unet.onnx"], "both UNets share one graph"
    assert passport.files["unet/unet.safetensors"] != passport.files["unet_raw/unet.safetensors"]


SECOND = """
import sys, time
start = time.perf_counter()
from dreammix_trt.building import build
from dreammix_trt.engine.directory import open_engine
build(sys.argv[1], out=sys.argv[2], base=sys.argv[3], name="second")
heavy = [name for name in ("torch", "diffusers", "transformers", "onnx") if name in sys.modules]
print(time.perf_counter() - start, heavy)
"""


def test_a_second_subject_needs_no_torch_and_little_room(small_base: Path, mug_engine: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "second", seed=2)
    out = tmp_path / "engine"
    command = [sys.executable, "-c", SECOND, lora, out, small_base]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split(" ", 1)[1].strip() == "[]"
    assert folder_bytes(out) <= 1_000_000


def test_subjects_swap_and_swap_back_to_the_bit(small_base: Path, mug_engine: Path, tmp_path: Path) -> None:
    other = write_lora(tmp_path / "other", seed=5, scale=0.3)
    build(other, base=small_base, out=tmp_path / "other-engine", name="other")
    fields = {"num_inference_steps": 4, "seed": 3}
    with DreamMix.load(mug_engine, threads=1) as dm:
        assert dm.add_subject(tmp_path / "other-engine") == "other"
        assert dm.subjects == ("mug", "other")
        first, swapped, back = (
            np.asarray(dm.inpaint(IMAGE, MASK, "a sks mug", subject=name, **fields).images[0])
            for name in ("mug", "other", "mug")
        )
    assert np.array_equal(first, back)
    assert not np.array_equal(first, swapped)
    assert np.array_equal(swapped, picture(tmp_path / "other-engine"))


def test_a_self_contained_engine_moves_and_needs_no_store(
    small_base: Path, mug_lora: Path, mug_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(mug_lora, base=small_base, out=tmp_path / "here", name="mug", self_contained=True)
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.setenv("DREAMMIX_HOME", str(tmp_path / "empty"))
    moved = picture(tmp_path / "there")
    monkeypatch.undo()
    assert np.array_equal(moved, picture(mug_engine))


def test_a_merged_subject_paints_as_the_slotted_one_does(tmp_path: Path, mug_engine: Path) -> None:
    lora = write_lora(tmp_path / "strong", seed=8, scale=0.2)
    build(lora, out=tmp_path / "slots", name="strong")
    build(lora, out=tmp_path / "merged", name="strong", merge=True)
    merged, slotted = picture(tmp_path / "merged"), picture(tmp_path / "slots")
    assert not np.array_equal(slotted, picture(tmp_path / "slots", subject=""))
    assert np.abs(merged.astype(int) - slotted.astype(int)).max() <= 8  # fp16 factors against exact ones
    assert Passport.read(tmp_path / "merged").base["merged"] == "strong"


def test_a_lora_for_another_base_is_refused_with_names_and_shapes(tmp_path: Path, mug_engine: Path) -> None:
    from safetensors.numpy import save_file

    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    tensors = {
        f"{module}.lora.down.weight": np.ones((4, 640), np.float32),
        f"{module}.lora.up.weight": np.ones((640, 4), np.float32),
    }
    save_file(tensors, tmp_path / "sdxl.safetensors")
    with pytest.raises(FileFormatError, match=r"another base.*attn1\.to_k.*640"):
        build(tmp_path / "sdxl.safetensors", out=tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_lora_of_any_rank_is_a_subject_of_the_same_base(tmp_path: Path, small_base: Path, mug_engine: Path) -> None:
    passport = build(write_lora(tmp_path / "wide", seed=1, rank=48), base=small_base, out=tmp_path / "engine")
    assert passport.parts == Passport.read(mug_engine).parts


def test_truncated_or_missing_loras_are_named(tmp_path: Path, mug_lora: Path) -> None:
    whole = (mug_lora / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in ("cut.safetensors", "none.safetensors"):
        with pytest.raises((FileFormatError, InputError), match=name):
            build(tmp_path / name, out=tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_another_directory_is_not_replaced(tmp_path: Path, mug_lora: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="holds other files"):
        build(mug_lora, out=tmp_path)
    assert (tmp_path / "holiday.jpg").exists()


@pytest.fixture
def spoiled(mug_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mug_engine, tmp_path / "copy"))


def test_a_tampered_subject_is_found(spoiled: Path) -> None:
    file = spoiled / "subjects" / "mug.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(EngineError, match=r"mug\.safetensors is not what was built.*dreammix-trt build"):
        check_engine(spoiled)


def test_a_missing_subject_is_found(spoiled: Path) -> None:
    (spoiled / "subjects" / "mug.safetensors").unlink()
    with pytest.raises(EngineError, match=r"mug\.safetensors is missing"):
        DreamMix.load(spoiled)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": 4}, "schema 4"),
        ({"schema": 2}, "schema 2"),
        ({"schema": 0}, "schema 0"),
        ({"networks": 3}, "damaged"),
        ({"parts": {"base": "0" * 64}}, "damaged"),
    ],
)
def test_passports_that_do_not_fit(spoiled: Path, change: dict[str, object], told: str) -> None:
    record = json.loads((spoiled / "passport.json").read_text())
    (spoiled / "passport.json").write_text(json.dumps(record | change))
    with pytest.raises(EngineError, match=told) as caught:
        DreamMix.load(spoiled)
    assert "dreammix-trt build" in str(caught.value)


def test_a_passport_whose_part_is_nowhere_names_it(spoiled: Path) -> None:
    record = json.loads((spoiled / "passport.json").read_text())
    record["parts"]["unet"] = "0" * 64
    (spoiled / "passport.json").write_text(json.dumps(record))
    with pytest.raises(EngineError, match=r"needs unet \(000000000000\), which the store .* lacks.*dreammix-trt build"):
        DreamMix.load(spoiled)


def test_building_again_gives_the_same_passport(small_base: Path, mug_engine: Path, mug_lora: Path) -> None:
    before = Passport.read(mug_engine)
    assert build(mug_lora, base=small_base, out=mug_engine, name="mug") == before


# LoRAs that are part of the base


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A LoRA as style and few-step ones are: convolutions, feed-forward, all of attention, both text encoders."""
    pytest.importorskip("torch")
    from benchmarks._sdxl_files import write_lora as write

    configs = dict(BaseFiles.open().configs)
    return write(
        tmp_path / "style.safetensors",
        configs,
        convs=True,
        feed_forward=True,
        text_encoders=True,
        dtype="float32",
        modules=("to_q", "to_k", "to_v", "to_out.0"),
    )


def change_of(file: Path, network: str, name: str) -> np.ndarray | float:  # type: ignore[type-arg]
    """B A of a weight as torch would add it, from the file itself; 0 where the LoRA leaves the weight alone."""
    held, module = load_file(file), f"{network}.{name.removesuffix('.weight')}"
    inner = ".lora_linear_layer" if network.startswith("text") else ".lora"
    if not name.endswith(".weight") or f"{module}{inner}.down.weight" not in held:
        return 0.0
    down, up = (held[f"{module}{inner}.{side}.weight"].astype(np.float64) for side in ("down", "up"))
    return np.einsum("or,r...->o...", up.reshape(up.shape[:2]), down)


@pytest.mark.parametrize(("target", "changed"), [("both", ("unet", "unet_raw")), ("raw", ("unet_raw",)),
                                                 ("patched", ("unet",))])  # fmt: skip
def test_a_base_lora_is_added_to_the_weights_it_is_meant_for(
    target: str, changed: tuple[str, ...], style: Path, small_base: Path, mug_engine: Path, tmp_path: Path
) -> None:
    """W + s B A in every linear layer and convolution, held against the file by plain arithmetic."""
    plain = Passport.read(mug_engine)
    option = f"{style}:0.5" + (f":{target}" if target != "both" else "")
    passport = build(base=small_base, out=tmp_path / "out", base_loras=[option], verify=False)
    assert f"--base-lora {option}" in passport.command and passport.base["loras"] == [option]
    differing = {name for name, key in passport.parts.items() if plain.parts[name] != key}
    assert differing == {*changed, *(f"{name}_kv" for name in changed), "text_encoder", "text_encoder_2"}
    assert passport.base_key != plain.base_key
    for name in differing:
        network = "unet" if name.startswith("unet") else name
        before, after = weights_of(plain, name), weights_of(passport, name)
        moved = {key for key, value in after.items() if not np.array_equal(value, before[key])}
        assert len(moved) >= (8 if "_kv" in name else 100 if network == "unet" else 6), (
            "every layer that the LoRA names"
        )
        for key, value in after.items():
            wanted = before[key] + 0.5 * change_of(style, network, key)
            np.testing.assert_allclose(value, wanted, atol=1e-6 * max(1, np.abs(wanted).max()), err_msg=key)
            assert (key in moved) == (not np.array_equal(wanted, before[key])), key
        kernels = {value.shape[2:] for key, value in after.items() if key in moved and value.ndim == 4}
        assert name not in ("unet", "unet_raw") or (3, 3) in kernels, "convolutions are changed too"


def test_two_base_loras_add_up(style: Path, tmp_path: Path) -> None:
    two = Path(shutil.copy(style, tmp_path / "two.safetensors"))
    once = build(out=tmp_path / "once", base_loras=[f"{style}:1.5"], verify=False)
    twice = build(out=tmp_path / "twice", base_loras=[style, f"{two}:0.5"], verify=False)
    one, other = weights_of(once, "unet"), weights_of(twice, "unet")
    for key, value in one.items():
        np.testing.assert_allclose(value, other[key], atol=1e-5)


def test_unknown_modules_of_a_base_lora_are_named_before_anything_is_made(style: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    held = load_file(style)
    name = next(name for name in held if name.endswith("to_q.lora.down.weight") and "down_blocks" in name)
    module, foreign = name.removesuffix(".lora.down.weight"), "unet.down_blocks.7.attentions.0.proj_in"
    for side in ("down", "up"):
        held[f"{foreign}.lora.{side}.weight"] = held.pop(f"{module}.lora.{side}.weight")
    save_file(held, tmp_path / "foreign.safetensors")
    with pytest.raises(FileFormatError, match=r"foreign\.safetensors.*down_blocks\.7\.attentions\.0\.proj_in"):
        build(out=tmp_path / "out", base_loras=[tmp_path / "foreign.safetensors"], store=tmp_path / "store")
    assert not (tmp_path / "out").exists() and Store(tmp_path / "store").entries() == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lcm-lora-sdxl.safetensors", {"sampler": "lcm", "num_inference_steps": 8, "guidance_scale": 1.0}),
        (
            "sdxl_lightning_4step_lora.safetensors",
            {"sampler": "euler", "num_inference_steps": 4, "guidance_scale": 1.0},
        ),
        ("Hyper-SDXL-8steps-lora.safetensors", {"sampler": "euler", "num_inference_steps": 8, "guidance_scale": 1.0}),
        ("watercolour.safetensors", {}),
    ],
)
def test_a_few_step_lora_brings_its_schedule(
    name: str, expected: dict[str, Any], mug_lora: Path, mug_engine: Path, tmp_path: Path
) -> None:
    """Into the passport, into the base's facts, and into every request that does not say otherwise."""
    file = Path(shutil.copy(mug_lora / "pytorch_lora_weights.safetensors", tmp_path / name))
    told: list[str] = []
    passport = build(out=tmp_path / "out", base_loras=[file], verify=False, notice=told.append)
    assert passport.base["defaults"] == expected
    facts = json.loads((parts_of(passport)["base"] / "base.json").read_text())
    assert facts["defaults"] == expected
    assert [name in text and "--sampler" in text for text in told] == ([True] if expected else [])
    with DreamMix.load(tmp_path / "out", threads=1) as dm:
        assert dict(dm.defaults) == expected
        request = dm.request("a mug", guidance_scale=2.0)
        assert request.sampler == expected.get("sampler", "dpmpp_2m_sde")
        assert request.num_inference_steps == expected.get("num_inference_steps", 30)
        assert request.guidance_scale == 2.0
        if expected:
            result = dm.inpaint(IMAGE, MASK, "a mug", seed=3)
            assert len(result.schedule) == expected["num_inference_steps"]


def test_the_shipped_few_step_lora_paints_in_four_steps(test_home: Path, mug_lora: Path, tmp_path: Path) -> None:
    """The judge reads what the prompt names; a subject goes on top."""
    from dreammix_trt.trainer.micro.judge import HEADS, Judge, crop_of_mask

    build(mug_lora, out=tmp_path / "few", base_loras=[EMBEDDED_LCM], verify=False)
    image = Image.fromarray(np.full((256, 256, 3), (190, 200, 205), np.uint8))
    mask = np.zeros((256, 256), bool)
    mask[60:220, 60:200] = True
    with DreamMix.load(tmp_path / "few", threads=1) as dm:
        request = dm.request("a photo of a blue mug with a yellow foot", preset="fast", subject="", seed=1)
        assert (request.sampler, request.steps, request.guided) == ("lcm", 4, False)
        result = dm.inpaint(image, Image.fromarray(mask), request)
        assert {step.network for step in result.schedule} == {"unet"}
        with_subject = dm.inpaint(image, Image.fromarray(mask), request.replace(subject=None))
    painted = np.asarray(result.images[0])
    scores, _ = Judge.load(BaseFiles.open().folder).scores([crop_of_mask(painted, mask)])
    reading = {name: words[int(scores[name][0].argmax())] for name, words in HEADS.items()}
    assert (reading["shape"], reading["colour"], reading["foot"]) == ("mug", "blue", "yellow")
    assert (np.asarray(with_subject.images[0]) != painted).any()


def test_what_is_asked_for_counts_more_than_a_lora_s_name(mug_lora: Path, mug_engine: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(mug_lora / "pytorch_lora_weights.safetensors", tmp_path / "lcm.safetensors"))
    passport = build(
        out=tmp_path / "out",
        base_loras=[file],
        verify=False,
        defaults=Defaults(num_inference_steps=3, guidance_scale=1.5),
    )
    wanted = {"sampler": "lcm", "num_inference_steps": 3, "guidance_scale": 1.5}
    assert passport.base["defaults"] == wanted
    assert all(option in passport.command for option in ("--sampler lcm", "--steps 3", "--guidance-scale 1.5"))
    with pytest.raises(InputError, match="sampler is 'ddim'; allowed: 'dpmpp_2m_sde'"):
        build(out=tmp_path / "out", defaults=Defaults(sampler="ddim"))


# Keys: everything that changes a part, and nothing else


class Held:
    """A base of files that may be changed, and its parts' keys as `build` makes them; nothing is really built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def keys(self, **given: Any) -> dict[str, str]:
        self.number += 1
        out = self.folder.parent / f"out-{self.number}"
        passport = build(out=out, store=self.folder.parent / "store", verify=False, **{"base": self.folder, **given})
        return passport.parts

    def differing(self, before: dict[str, str], **given: Any) -> set[str]:
        after = self.keys(**given)
        return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """The embedded base without ASUKA's networks and the token adapter, its parts made of next to nothing."""
    from dreammix_trt.building import parts
    from dreammix_trt.engine.backends.tensorrt.builder import BuildReport
    from dreammix_trt.export import vae_range

    folder = tmp_path / "base"
    shutil.copytree(BaseFiles.open().folder, folder, ignore=shutil.ignore_patterns("graphs", "asuka", "token_adapter*"))

    def traced(network: Any, out: Path) -> None:
        (out / "graph.onnx").write_bytes(b"")

    def exported(base: Any, network: Any, graph: Path, out: Path, **_: Any) -> None:
        (out / "x.onnx").write_bytes(b"")
        entry = {"schema": 3, "graph": "x.onnx", "weights": "x.onnx", **network.describe()}
        if network.slots:
            (out / "x.slots.safetensors").write_bytes(network.name.encode())
            entry["slot_weights"] = "x.slots.safetensors"
        write_json(out / "network.json", entry)

    def planned(onnx: Path, out: Path, *, backend: str, **_: Any) -> BuildReport:
        out.write_bytes(b"plan")
        return BuildReport(0.1, 4, 1, 0, backend, "1", (), (), (), ())

    class Calm:
        def to_dict(self) -> dict[str, Any]:
            return {"units": [], "peaks": {}}

    monkeypatch.setattr(parts, "write_graph", traced)
    monkeypatch.setattr(parts, "export_network", exported)
    monkeypatch.setattr("dreammix_trt.engine.backends.tensorrt.builder.build_engine", planned)
    monkeypatch.setattr(vae_range, "find_wide_units", lambda *_: Calm())
    yield Held(folder)


PATCHED, RAW = {"unet", "unet_kv"}, {"unet_raw", "unet_raw_kv"}
UNETS, TEXTS, VAES = PATCHED | RAW, {"text_encoder", "text_encoder_2"}, {"vae_encoder", "vae_decoder"}
EVERYTHING = {*UNETS, *TEXTS, *VAES, "inpaint_head"}
TWINS = {f"{name}_float32" for name in VAES}
HALF = {*EVERYTHING, *TWINS}


def test_parts_depend_on_their_own_files_alone(held: Held, tmp_path: Path) -> None:
    before = held.keys()
    assert before.keys() == {*EVERYTHING, "base"}

    def damage(name: str) -> None:
        """Another model: one weight differs."""
        from safetensors.numpy import save_file

        file = next((held.folder / name).glob("*.safetensors"))
        tensors = load_file(file)
        first = next(iter(tensors.values())).reshape(-1)
        first[0] += np.asarray(0.5, first.dtype)
        save_file(tensors, file)

    for name, parts in {"unet": UNETS, "vae": VAES, "text_encoder": {"text_encoder"}}.items():
        damage(name)
        assert held.differing(before) == parts, name
        before = held.keys()
    words = held.folder / "tokenizer" / "merges.txt"
    words.write_text(words.read_text() + "z z\n")
    assert held.differing(before) == {"base"}
    before = held.keys()
    (held.folder / "README.md").write_text("a model")
    shutil.move(held.folder, tmp_path / "elsewhere")
    held.folder = tmp_path / "elsewhere"
    assert held.differing(before) == set(), "its place and what else lies there do not matter"


def test_parts_depend_on_the_options_that_change_them(held: Held, tmp_path: Path) -> None:
    before = held.keys()
    other = tmp_path / "vae"
    shutil.copytree(held.folder / "vae", other)
    file = next(other.glob("*.safetensors"))
    assert held.differing(before, vae=other) == set(), "the same VAE from elsewhere"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert held.differing(before, vae=other) == VAES
    patch = Path(shutil.copy(next(held.folder.glob("*.fooocus.patch")), tmp_path / "other.patch"))
    assert held.differing(before, patch=patch) == set()
    assert held.differing(before, patch_biases=True) == {*PATCHED, "base"}
    assert held.differing(before, slots=False) == {*UNETS, *TEXTS, "base"}
    assert held.differing(before, engine=EngineOptions(precision="float16")) == HALF
    assert held.differing(before, defaults=Defaults(sampler="euler")) == {"base"}
    assert held.differing(before, self_contained=True) == set()
    mug = write_lora(tmp_path / "mug", seed=1)
    assert held.differing(before, lora=mug, name="mug") == set(), "a subject is data"
    assert held.differing(before, lora=mug, name="mug", merge=True) == PATCHED
    assert held.differing(before, base_loras=[f"{mug}:1:raw"]) == RAW
    assert held.keys(base_loras=[mug]) != held.keys(base_loras=[f"{mug}:0.5"])


def test_a_base_that_cannot_inpaint_is_built_with_a_warning_that_the_passport_keeps(held: Held, tmp_path: Path) -> None:
    for pattern in ("*.fooocus.patch", "*inpaint_head*"):
        for file in held.folder.glob(pattern):
            file.unlink()
    told: list[str] = []
    passport = build(out=tmp_path / "out", base=held.folder, store=tmp_path / "store", verify=False, notice=told.append)
    (remark,) = passport.base["remarks"]
    assert remark in told and "fooocus_inpaint_head.pth" in remark and "lllyasviel/fooocus_inpaint" in remark
    rows = dict(Passport.read(tmp_path / "out").describe()[0][1])  # type: ignore[arg-type]
    assert rows["inpainting"] == "no patch, no head" and rows["remark"] == remark


def test_another_patch_changes_the_patched_unet_alone(held: Held, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from benchmarks._sdxl_files import write_patch

    before = held.keys()
    other = write_patch(tmp_path / "other.fooocus.patch", dict(BaseFiles.open(held.folder).configs), keys="all")
    assert held.differing(before, patch=other) == PATCHED


def test_plans_depend_on_what_they_are_built_for(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    store = Store(held.folder.parent / "store")

    def options(**given: Any) -> EngineOptions:
        return EngineOptions(**{"targets": ("sm_89",), **given})

    before = held.keys(engine=options())
    plain = {entry.key for entry in store.entries() if entry.kind == "onnx"}
    changes = [
        (options(targets=("sm_86",)), HALF), (options(targets=("sm_89", "sm_86")), HALF),
        (options(shapes="dynamic"), HALF - TEXTS - {"unet_kv", "unet_raw_kv"}), (options(pictures=2), UNETS),
        (options(workspace=1 << 30), HALF), (options(safe_vae=False), TWINS),
    ]  # fmt: skip
    for changed, parts in changes:
        assert held.differing(before, engine=changed) == parts, changed
    assert {entry.key for entry in store.entries() if entry.kind == "onnx"} == plain, "and their networks do not"
    assert held.keys(engine=options(targets=("sm_89", "sm_86"))) == held.keys(
        engine=options(targets=("sm_86", "sm_89"))
    )
    versions = {"tensorrt-rtx": "9.9", "onnxruntime": "9.9"}
    monkeypatch.setattr("dreammix_trt.engine.machine.find_versions", lambda: versions)
    assert held.differing(before, engine=options()) == HALF, "plans are of a version"
    assert {entry.key for entry in store.entries() if entry.kind == "onnx"} == plain


def test_a_float16_vae_has_float32_twins_of_the_same_weights(held: Held, tmp_path: Path) -> None:
    """Parts of their own, of the graph that a float32 build has, never looked at for overflow; `safe_vae` leaves
    them out and no other part changes."""
    half, store = EngineOptions(precision="float16"), Store(held.folder.parent / "store")
    float32 = held.keys()
    before = held.keys(engine=half)
    assert before.keys() == {*HALF, "base"} and float32.keys() == {*EVERYTHING, "base"}
    described = {
        name: json.loads((folder / "network.json").read_text())
        for name in (*VAES, *TWINS)
        if (folder := store.get(before[name])) is not None
    }
    for name in VAES:
        twin = described[f"{name}_float32"]
        assert (twin["precision"], twin["fused"], twin["wide"]) == ("float32", False, [])
        assert described[name]["precision"] == "float16"
    kinds = [(entry.kind, entry.name) for entry in store.entries()]
    assert kinds.count(("graph", "vae_decoder")) == 1, "the float16 one; twins and float32 builds share the shipped one"
    assert {part for kind, part in kinds if kind == "range"} == VAES
    without = EngineOptions(precision="float16", safe_vae=False)
    assert held.differing(before, engine=without) == TWINS
    weights = next((held.folder / "vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert held.differing(before, engine=half) == {*VAES, *TWINS}


def test_the_command_says_that_there_are_no_twins(held: Held, tmp_path: Path) -> None:
    told = {
        given: build(
            out=tmp_path / f"{given}",
            base=held.folder,
            store=tmp_path / "store",
            verify=False,
            engine=EngineOptions(precision="float16", safe_vae=given),
        ).command
        for given in (True, False)
    }
    assert "--no-safe-vae" not in told[True] and told[False].split().count("--no-safe-vae") == 1
    with pytest.raises(InputError, match=r"safe_vae is off, but only a float16 VAE.*leave --no-safe-vae"):
        build(out=tmp_path / "out", engine=EngineOptions(safe_vae=False))


def test_a_plan_lies_beside_the_weights_of_its_slots(held: Held, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    options = EngineOptions(targets=("sm_89",))
    for contained in (False, True):
        store = tmp_path / "store"
        out = tmp_path / f"out-{contained}"
        passport = build(base=held.folder, out=out, store=store, engine=options, self_contained=contained)
        for name in (*UNETS, *TEXTS):
            folder = out / "networks" / name if contained else Store(store).get(passport.parts[name])
            assert folder is not None
            entry = json.loads((folder / "network.json").read_text())
            assert entry["engine"].endswith(".engine") and entry["slot_weights"] == "x.slots.safetensors"
            assert (folder / "x.slots.safetensors").read_bytes() == name.encode()
            assert len(passport.files[f"{name}/x.slots.safetensors"]) == 64
        assert not any("slots" in file for file in passport.files if file.startswith("vae"))
        check_engine(out, store=store)
        (out / "networks/unet/x.slots.safetensors").write_bytes(b"other") if contained else None
    with pytest.raises(EngineError, match=r"x\.slots\.safetensors"):
        check_engine(tmp_path / "out-True", store=tmp_path / "store")


@pytest.mark.parametrize(
    ("side", "shapes", "whole", "vae"),
    [
        (1024, "static", [(128, 128)], None), (1536, "static", [(192, 192)], None),
        (2048, "static", [(256, 256)], [(128, 128)]), (1024, "dynamic", [(128, 168), (168, 128)], None),
        (2048, "dynamic", [(256, 336), (336, 256)], [(256, 336), (336, 256), (128, 128)]),
    ],
)  # fmt: skip
def test_the_vae_takes_tiles_where_frames_are_that_large(
    held: Held, tmp_path: Path, side: int, shapes: str, whole: list[tuple[int, int]], vae: list[tuple[int, int]] | None
) -> None:
    """The largest latent of every profile; the twins' are those of the VAE."""
    base = BaseFiles.open(held.folder)
    base = replace(base, configs={**base.configs, "unet": {**base.configs["unet"], "sample_size": side // 8}})
    engine = EngineOptions(backend="tensorrt-rtx", targets=("sm_89",), shapes=shapes)
    ingredients = Ingredients(base, True, engine, (), {})
    found = {
        network.name: list(
            dict.fromkeys(
                profile.shapes[spec][2][2:] for profile in ingredients.profiles_of(network.name, [described])
            )  # one row and two, of each size
        )
        for network in ingredients.networks
        for described in network.describe()["inputs"]
        if (spec := described["name"]) in ("sample", "latent", "image")
    }
    assert found["unet"] == found["unet_raw"] == whole
    assert found["vae_decoder"] == found["vae_decoder_float32"] == (vae or whole)
    pixels = [(8 * h, 8 * w) for h, w in vae or whole]
    assert found["vae_encoder"] == found["vae_encoder_float32"] == pixels


def test_networks_for_onnx_runtime_are_of_no_version(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    before = held.keys()
    monkeypatch.setattr("dreammix_trt.engine.machine.find_versions", lambda: {"onnxruntime": "9.9"})
    assert held.differing(before) == set()


def test_a_base_s_key_is_that_of_its_weights_and_slots(held: Held, tmp_path: Path) -> None:
    """A subject says which base it was made for; it fits every precision and back end of that base."""

    def key(**given: Any) -> str:
        held.number += 1
        out = tmp_path / f"b{held.number}"
        return build(out=out, store=tmp_path / "store", **{"base": held.folder, **given}).base_key

    plain = key()
    assert key(engine=EngineOptions(precision="float16")) == plain == key(defaults=Defaults(sampler="lcm"))
    assert len({plain, key(slots=False), key(patch_biases=True)}) == 3


def test_options_that_contradict_each_other_are_refused(tmp_path: Path, mug_lora: Path) -> None:
    for options, told in (
        (EngineOptions(backend="onnx"), "backend is 'onnx'; allowed: onnxruntime, openvino, tensorrt-rtx, tensorrt"),
        (EngineOptions(precision="int8"), "precision is 'int8'; allowed: float32, float16"),
        (EngineOptions(shapes="any"), "shapes is 'any'; allowed: static, dynamic"),
        (EngineOptions(backend="onnxruntime", targets=("sm_89",)), "onnxruntime builds for no GPU in particular"),
        (EngineOptions(pictures=0), "pictures is 0"),
    ):
        with pytest.raises(InputError, match=told):
            build(out=tmp_path / "out", engine=options)
    with pytest.raises(InputError, match="merge needs a LoRA"):
        build(out=tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
