"""What a user may hold, through `build`: one SDXL in every format becomes the same parts, and what is none is named.

The checkpoints have two levels and random weights; `tests/core` holds the readers against diffusers' own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch")
pytest.importorskip("onnxslim")

from benchmarks import _sdxl_files as files
from dreammix_trt.building import EngineOptions, build
from dreammix_trt.core.errors import BuildError, DreamMixError, FileFormatError, InputError
from dreammix_trt.core.networks import KINDS
from dreammix_trt.core.passport import Passport
from dreammix_trt.core.store import Store
from dreammix_trt.export.parity import OnnxNetwork
from tests.support.mini_sdxl import Checkpoint, small_configs, trace_once, write_single
from tests.support.sgm import write_header

NETWORKS = {kind.name for kind in KINDS if kind.group not in ("asuka", "tokens")}  # which no base has by itself
CONFIGS = small_configs()


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_single(tmp_path_factory.mktemp("held"), CONFIGS)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for this file alone."""
    return tmp_path_factory.mktemp("shelf") / "store"


@pytest.fixture(scope="module", autouse=True)
def _traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        trace_once(patch, {}, tmp_path_factory.mktemp("traces"))
        yield


def parts_of(passport: Passport, shelf: Path) -> dict[str, Path]:
    folders = {name: Store(shelf).get(key) for name, key in passport.parts.items()}
    return {name: folder for name, folder in folders.items() if folder is not None}


def weight_files(passport: Passport) -> dict[str, str]:
    """Part -> hash of its weights."""
    return {file.split("/")[0]: digest for file, digest in passport.files.items() if file.endswith(".safetensors")}


def made(shelf: Path, out: Path, **given: Any) -> Passport:
    return build(out=out, store=shelf, verify=False, **given)


@pytest.fixture(scope="module")
def single(held: Checkpoint, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Passport:
    """Built from the single file, with patch and head."""
    return made(shelf, tmp_path_factory.mktemp("out") / "single", **held.given())


FORMS: dict[str, dict[str, Any]] = {
    "diffusers folder": {}, "fp16 variant in shards": {"variant": "fp16", "shards": 3}, "bin": {"format": "bin"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_format_of_a_checkpoint_becomes_the_same_weights(
    form: str, held: Checkpoint, single: Passport, shelf: Path, tmp_path: Path
) -> None:
    folder = files.write_folder(tmp_path / "base", CONFIGS, **FORMS[form])
    passport = made(shelf, tmp_path / "out", base=folder, patch=held.patch, head=held.head)
    assert weight_files(passport) == weight_files(single)
    assert weight_files(passport).keys() == NETWORKS
    graphs = {name: digest for name, digest in passport.files.items() if name.endswith(".onnx")}
    assert graphs == {name: digest for name, digest in single.files.items() if name.endswith(".onnx")}
    facts, same = (json.loads((parts_of(each, shelf)["base"] / "base.json").read_text()) for each in (passport, single))
    assert (facts.pop("native_side"), same.pop("native_side")) == (64, 1024)  # a single file does not say it
    assert facts == same
    assert passport.files["base/tokenizer_2/vocab.json"] == single.files["base/tokenizer_2/vocab.json"]


def test_a_folders_graph_is_traced_to_the_byte_as_the_single_files(held: Checkpoint, tmp_path: Path) -> None:
    """A single file's config is told by shapes; here the exporter itself says that nothing was missed."""
    from dreammix_trt.core.checkpoint import BaseFiles
    from dreammix_trt.core.networks import describe_networks
    from dreammix_trt.export.onnx_graph import trace_graph

    folder = BaseFiles.open(files.write_folder(tmp_path / "base", CONFIGS))
    file = BaseFiles.open(held.base, tokenizer=held.tokenizer)
    for one, other in zip(describe_networks(folder), describe_networks(file), strict=True):
        if one.name in ("unet", "text_encoder_2", "vae_encoder"):
            assert trace_graph(one).proto.SerializeToString() == trace_graph(other).proto.SerializeToString(), one.name


def test_bfloat16_keeps_its_values(held: Checkpoint, shelf: Path, tmp_path: Path) -> None:
    """In both formats, and exactly: float32 holds every bfloat16."""
    file = files.write_single_file(tmp_path / "b.safetensors", CONFIGS, dtype="bfloat16")
    folder = files.write_folder(tmp_path / "b", CONFIGS, dtype="bfloat16")
    one = made(shelf, tmp_path / "one", base=file, tokenizer=held.tokenizer)
    other = made(shelf, tmp_path / "other", base=folder)
    assert weight_files(one) == weight_files(other)
    stored = load_file(parts_of(one, shelf)["vae_encoder"] / "vae_encoder.safetensors")["encoder.conv_in.weight"]
    bits = files.draw(0, "vae", "encoder.conv_in.weight", stored.shape, "bfloat16").astype(np.uint32) << 16
    assert np.array_equal(stored, bits.view(np.float32))


def test_a_nine_channel_unet_is_the_same_graph_with_a_head_of_its_own(
    held: Checkpoint, single: Passport, shelf: Path, tmp_path: Path
) -> None:
    import torch

    wide = files.write_single_file(tmp_path / "inpainting.safetensors", CONFIGS, in_channels=9)
    passport = made(shelf, tmp_path / "out", base=wide, tokenizer=held.tokenizer)
    assert {entry.name for entry in passport.networks} == NETWORKS - {"unet_raw", "unet_raw_kv"}
    assert passport.base["head"] == "zeros" and single.base["head"] == "replicate"
    assert weight_files(passport)["unet"] == weight_files(single)["unet_raw"]
    assert passport.files["unet/unet.onnx"] == single.files["unet/unet.onnx"]
    parts = parts_of(passport, shelf)
    assert json.loads((parts["base"] / "base.json").read_text())["head"] == "zeros"
    weight = load_file(parts["inpaint_head"] / "inpaint_head.safetensors")["head.weight"]
    extra = files.draw(0, "unet", "conv_in.inpaint.weight", (32, 5, 3, 3))
    assert np.array_equal(weight, extra.astype(np.float32))
    # what the 9-channel convolution gives is the 4-channel one plus the head, at the border too
    rng = np.random.default_rng(0)
    x, masked = (rng.standard_normal((1, 4, 6, 7)).astype(np.float32) for _ in range(2))
    mask = (rng.random((1, 1, 6, 7)) > 0.5).astype(np.float32)
    plain = files.draw(0, "unet", "conv_in.weight", (32, 4, 3, 3)).astype(np.float32)
    both = [np.concatenate(pair, 1) for pair in ((plain, weight), (x, mask))]
    nine = torch.conv2d(torch.from_numpy(np.concatenate([both[1], masked], 1)), torch.from_numpy(both[0]), padding=1)
    four = torch.conv2d(torch.from_numpy(x), torch.from_numpy(plain), padding=1)
    head = OnnxNetwork(parts["inpaint_head"] / "inpaint_head.onnx").run(mask=mask, masked_latent=masked)["feature"]
    np.testing.assert_allclose(four.numpy() + head, nine.numpy(), atol=1e-5)


def test_another_place_gives_the_same_parts(held: Checkpoint, single: Passport, shelf: Path, tmp_path: Path) -> None:
    """Nothing in a key says where files lie: no network is made again."""
    copies = {name: Path(shutil.copy(place, tmp_path)) for name, place in held.given().items() if place.is_file()}
    tokenizer = shutil.copytree(held.tokenizer, tmp_path / "words")
    passport = made(shelf, tmp_path / "out", **copies, tokenizer=tokenizer)
    assert passport.parts == single.parts and passport.base_key == single.base_key
    assert passport.command != single.command


def test_half_the_precision_is_the_same_weights_rounded(
    held: Checkpoint, single: Passport, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreammix_trt.export.vae_range.find_wide_units", lambda *_: Nothing())
    passport = made(shelf, tmp_path / "half", **held.given(), engine=EngineOptions(precision="float16"))
    assert (passport.precision, passport.backend) == ("float16", "onnxruntime")
    assert "--precision float16" in passport.command
    halves, wholes = parts_of(passport, shelf), parts_of(single, shelf)
    for name, graph in (("unet", "unet"), ("vae_decoder", "vae_decoder"), ("inpaint_head", "inpaint_head")):
        stored, whole = (load_file(folder[name] / f"{graph}.safetensors") for folder in (halves, wholes))
        assert all(np.array_equal(stored[key], value.astype(np.float16)) for key, value in whole.items())
        assert stored.keys() == whole.keys() and {value.dtype.name for value in stored.values()} == {"float16"}
    assert passport.parts["base"] == single.parts["base"]
    assert passport.base_key == single.base_key, "subjects may move between precisions"


class Nothing:
    """A VAE that float16 holds."""

    def to_dict(self) -> dict[str, Any]:
        return {"units": [], "peaks": {"x": 1.0}}


# Several LoRAs


def lora(path: Path, **options: Any) -> Path:
    return files.write_lora(path, CONFIGS, **options)


def subject_factors(out: Path) -> Mapping[str, np.ndarray]:
    (file,) = (out / "subjects").iterdir()
    return {name.removeprefix("factors."): factor for name, factor in load_file(file).items()}


def products(out: Path) -> dict[str, np.ndarray]:
    """network.module -> A @ B of a subject's file."""
    held = subject_factors(out)
    names = sorted({name.rpartition(".")[0] for name in held})
    return {name: held[f"{name}.A"].astype(np.float64) @ held[f"{name}.B"].astype(np.float64) for name in names}


def change(file: Path, module: str) -> np.ndarray:
    """(up @ down)^T of a module as the reference's file has it."""
    held = load_file(file)
    down, up = (held[f"unet.{module}.lora.{side}.weight"].astype(np.float64) for side in ("down", "up"))
    product: np.ndarray = (up @ down).T
    return product


MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"


def test_a_lora_in_two_dialects_is_one_subject(held: Checkpoint, single: Passport, shelf: Path, tmp_path: Path) -> None:
    found = []
    for dialect in ("reference", "kohya_sgm", "peft"):
        file = lora(tmp_path / f"{dialect}.safetensors", dialect=dialect, text_encoders=True)
        made(shelf, tmp_path / dialect, lora=file, name="mug", **held.given())
        found.append(subject_factors(tmp_path / dialect))
    for other in found[1:]:
        assert other.keys() == found[0].keys() and len(other) > 40
        assert all(np.array_equal(other[name], found[0][name]) for name in other)


def test_several_loras_with_scales_and_targets_are_one_subject(
    held: Checkpoint, single: Passport, shelf: Path, tmp_path: Path
) -> None:
    """Ranks add up; the raw UNet gets what is meant for it, and only that."""
    one, two, three = (lora(tmp_path / f"{n}.safetensors", seed=n, rank=2) for n in range(3))
    given = [f"{one}:0.5", f"{two}:-2:raw", f"{three}:1.5:both"]
    passport = made(shelf, tmp_path / "out", lora=given, name="three", **held.given())
    assert passport.parts == single.parts, "subjects change nothing in the base"
    assert passport.subjects[0].target == "both"
    found = products(tmp_path / "out")
    expected = {"unet": 0.5 * change(one, MODULE), "unet_raw": -2 * change(two, MODULE)}
    for network, value in expected.items():
        wanted = value + 1.5 * change(three, MODULE)
        np.testing.assert_allclose(found[f"{network}.{MODULE}"], wanted, atol=2e-3 * np.abs(wanted).max())
    assert subject_factors(tmp_path / "out")[f"unet.{MODULE}.A"].shape == (64, 4)
    assert all(option in passport.command for option in (f"{one}:0.5", f"{two}:-2:raw", f"{three}:1.5:both"))


def test_ranks_add_up_without_a_limit(held: Checkpoint, single: Passport, shelf: Path, tmp_path: Path) -> None:
    one, two = (lora(tmp_path / f"{n}.safetensors", seed=n, rank=40) for n in range(2))
    passport = made(shelf, tmp_path / "out", lora=[one, two], **held.given())
    assert passport.parts == single.parts
    assert subject_factors(tmp_path / "out")[f"unet.{MODULE}.A"].shape == (64, 80)


def test_a_target_the_base_does_not_have_is_refused(held: Checkpoint, shelf: Path, tmp_path: Path) -> None:
    wide = files.write_single_file(tmp_path / "inpainting.safetensors", CONFIGS, in_channels=9)
    file = lora(tmp_path / "raw.safetensors")
    with pytest.raises(DreamMixError, match=r"unet_raw, which this base does not have.*'patched'"):
        made(shelf, tmp_path / "out", base=wide, tokenizer=held.tokenizer, lora=f"{file}:1:raw")
    assert not (tmp_path / "out").exists()


# What cannot be used


def _truncated(place: Path, held: Checkpoint) -> dict[str, Any]:
    (place / "cut.safetensors").write_bytes(held.base.read_bytes()[:3_000_000])
    return {"base": place / "cut.safetensors"}


def _not_a_number(place: Path, held: Checkpoint) -> dict[str, Any]:
    tensors = load_file(held.base)
    tensors["model.diffusion_model.out.2.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, place / "nan.safetensors")
    return {"base": place / "nan.safetensors"}


def _header(name: str, shapes: dict[str, tuple[int, ...]]) -> Any:
    return lambda place, _: {"base": write_header(place / f"{name}.safetensors", shapes)}


def _other_width(place: Path, held: Checkpoint) -> dict[str, Any]:
    from tests.support.mini_sdxl import mini_configs

    configs = mini_configs()
    return {"patch": files.write_patch(place / "other.patch", configs), "head": held.head}


def _head_alone(place: Path, held: Checkpoint) -> dict[str, Any]:
    """Beside its own file the base would find the patch."""
    return {"base": shutil.copy(held.base, place / "alone.safetensors"), "patch": None}


def _other_head(place: Path, held: Checkpoint) -> dict[str, Any]:
    configs = {"unet": {"block_out_channels": [48]}}
    return {"head": files.write_head(place / "other.pth", configs)}


def _lora_15(place: Path, held: Checkpoint) -> dict[str, Any]:
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{module}.lora.down.weight": np.ones((4, 768), np.float32)}
    save_file({**tensors, f"{module}.lora.up.weight": np.ones((640, 4), np.float32)}, place / "sd15.safetensors")
    return {"lora": place / "sd15.safetensors"}


def _with_space(place: Path, held: Checkpoint) -> dict[str, Any]:
    return {"lora": f"{lora(place / 'mine.safetensors')}:1:nowhere"}


def _broken_base_lora(place: Path, held: Checkpoint) -> dict[str, Any]:
    from tests.support.mini_sdxl import mini_configs

    return {"base_loras": [files.write_lora(place / "other-base.safetensors", mini_configs(), modules=("to_q",))]}


def _dora(place: Path, held: Checkpoint) -> dict[str, Any]:
    tensors = load_file(lora(place / "dora.safetensors", dialect="peft"))
    tensors[f"unet.{MODULE}.lora_magnitude_vector"] = np.ones(64, np.float16)
    save_file(tensors, place / "dora.safetensors")
    return {"base_loras": [place / "dora.safetensors"]}


SGM, CLIP = "model.diffusion_model.", "cond_stage_model."
BAD: dict[str, tuple[Any, str]] = {
    "a truncated checkpoint": (_truncated, r"cut\.safetensors: truncated"),
    "weights that are no numbers": (_not_a_number, r"nan\.safetensors.*out\.2\.weight.*NaN"),
    "Stable Diffusion 1.5": (
        _header("sd15", {f"{SGM}input_blocks.0.0.weight": (320, 4, 3, 3), f"{CLIP}transformer.x": (1,)}),
        r"sd15\.safetensors.*Stable Diffusion 1",
    ),
    "Stable Diffusion 2": (
        _header("sd2", {f"{SGM}input_blocks.0.0.weight": (320, 4, 3, 3), f"{CLIP}model.ln_final.weight": (1,)}),
        r"sd2\.safetensors.*Stable Diffusion 2",
    ),
    "the refiner": (
        _header("refiner", {f"{SGM}out.2.weight": (4, 384), "conditioner.embedders.0.model.ln_final.weight": (1,)}),
        r"refiner\.safetensors.*refiner",
    ),
    "Stable Diffusion 3": (_header("sd3", {f"{SGM}joint_blocks.0.x_block.a.weight": (9, 3)}), "Stable Diffusion 3"),
    "Flux": (_header("flux", {"double_blocks.0.img_attn.qkv.weight": (9, 3)}), r"flux\.safetensors.*Flux"),
    "no file": (lambda place, _: {"base": place / "nothing.safetensors"}, r"nothing\.safetensors"),
    "a patch without its head": (lambda place, held: {"head": None}, r"v26\.fooocus\.patch.*without its head"),
    "a head without its patch": (_head_alone, r"head\.pth.*without its patch"),
    "a patch for another width": (_other_width, r"other\.patch.*base\.safetensors"),
    "a head for another width": (_other_head, r"other\.pth.*48 channels.*32"),
    "a LoRA for Stable Diffusion 1.5": (_lora_15, r"another base \(Stable Diffusion 1\.x\)"),
    "an unknown target": (_with_space, "unknown target 'nowhere'"),
    "a base LoRA for another base": (_broken_base_lora, r"other-base\.safetensors.*another base.*which the base lacks"),
    "a DoRA": (_dora, r"dora\.safetensors.*DoRA"),
    "no tokenizer": (lambda place, _: {"tokenizer": None}, "give the folder of its own as tokenizer"),
    "no VAE there": (lambda place, _: {"vae": place / "vae.safetensors"}, r"vae\.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named_and_nothing_is_left(
    name: str, held: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear error; an engine that was in the way is as it was; no part of a part lies in the store."""
    arguments, told = BAD[name]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/passport.json").write_text("{}")
    given = held.given(**arguments(tmp_path, held))
    with pytest.raises(DreamMixError, match=told) as caught:
        made(tmp_path / "store", tmp_path / "out", **given)
    assert isinstance(caught.value, FileFormatError | InputError)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["passport.json"]
    assert list(tmp_path.rglob("*.tmp")) == []
    assert all(entry.complete for entry in Store(tmp_path / "store").entries())


EARLY = [name for name in BAD if name != "weights that are no numbers"]


@pytest.mark.parametrize("name", EARLY)
def test_it_is_named_before_anything_is_exported(
    name: str, held: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full-size parts take minutes each: whatever headers tell is told before the first."""
    from dreammix_trt.building import parts

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("exported before the input was checked")

    for step in ("export_network", "write_graph", "export_facts"):
        monkeypatch.setattr(parts, step, never)
    with pytest.raises(DreamMixError):
        made(tmp_path / "store", tmp_path / "out", **held.given(**BAD[name][0](tmp_path, held)))


def test_too_little_disk_is_told_before_the_build(
    held: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreammix_trt.engine import hardware

    monkeypatch.setattr(hardware, "disk_free", lambda _: 1 << 20)
    with pytest.raises(BuildError, match=r"store.*free"):
        made(tmp_path / "store", tmp_path / "out", **held.given())
    assert Store(tmp_path / "store").entries() == [] and not (tmp_path / "out").exists()
