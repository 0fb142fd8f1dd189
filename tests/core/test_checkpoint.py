from __future__ import annotations

import contextlib
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.checkpoint import COMPONENTS, EMBEDDED, BaseFiles
from dreammix_trt.core.diffusers_folder import find_weight_files
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.fooocus import read_patch
from dreammix_trt.core.keymap import sgm_to_diffusers

pytest.importorskip("torch")
pytest.importorskip("diffusers")
from tests.support.tiny_model import TinyModel, write_tiny_model


@pytest.fixture
def tiny(tmp_path: Path) -> TinyModel:
    return write_tiny_model(tmp_path / "tiny")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_brings_its_own_patch_and_head(tiny: TinyModel) -> None:
    base = BaseFiles.open(tiny.folder)
    assert (base.patch, base.head_file) == (tiny.patch, tiny.head)
    assert (base.native_side, base.latent_channels, base.feature_channels, base.divisor) == (64, 4, 32, 32)
    assert base.scaling_factor == 0.13025
    assert base.head().shape == (32, 5, 3, 3)


def test_weights_are_float32_and_patched_by_name(tiny: TinyModel) -> None:
    base = BaseFiles.open(tiny.folder)
    raw, patched = base.state("unet"), base.unet_patched_state()
    assert all(value.dtype == np.float32 for value in [*raw.values(), *patched.values()])
    names = sgm_to_diffusers(base.configs["unet"])
    changed = {name for name in raw if not np.array_equal(raw[name], patched[name])}
    assert changed == {names[key] for key in read_patch(tiny.patch) if key.endswith(".weight")}
    with_biases = BaseFiles.open(tiny.folder, patch_biases=True).unet_patched_state()
    assert any(not np.array_equal(raw[name], with_biases[name]) for name in raw if name.endswith(".bias"))


def test_golden_patch_and_head_are_found_by_argument(golden: Path) -> None:
    base = BaseFiles.open(golden / "model", golden / "tiny.fooocus.patch", golden / "inpaint_head.pth")
    assert base.feature_channels == 320 and base.native_side == 1024
    assert len(base.unet_patched_state()) == 408


def test_hashes_follow_the_content(tiny: TinyModel, tmp_path: Path) -> None:
    hashes = BaseFiles.open(tiny.folder).hash_contents()
    assert {
        "unet/diffusion_pytorch_model.safetensors",
        "patch",
        "inpaint_head",
        "tokenizer/vocab.json",
    } <= hashes.keys()
    again = BaseFiles.open(write_tiny_model(tmp_path / "again").folder).hash_contents()
    other = BaseFiles.open(write_tiny_model(tmp_path / "other", seed=1).folder).hash_contents()
    assert hashes["unet/diffusion_pytorch_model.safetensors"] == again["unet/diffusion_pytorch_model.safetensors"]
    assert hashes["unet/diffusion_pytorch_model.safetensors"] != other["unet/diffusion_pytorch_model.safetensors"]


def test_both_spellings_of_text_encoder_names_are_read(tiny: TinyModel) -> None:
    from safetensors.numpy import load_file, save_file

    path = tiny.folder / "text_encoder/model.safetensors"
    before = BaseFiles.open(tiny.folder).state("text_encoder")
    save_file({name.removeprefix("text_model."): value for name, value in load_file(path).items()}, path)
    assert BaseFiles.open(tiny.folder).state("text_encoder").keys() == before.keys()


def save_as_torch(folder: Path, stem: str, dtype: str, spelling: str) -> None:
    """Replace a component's safetensors by torch files, one or two with an index."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    (source,) = folder.glob("*.safetensors")
    state = {name: value.to(getattr(torch, dtype)) for name, value in load_file(source).items()}
    source.unlink()
    if "index" not in spelling:
        torch.save(state, folder / f"{stem}{spelling}")
        return
    parts = {name: f"{stem}-{number % 2}.bin" for number, name in enumerate(state)}
    for part in set(parts.values()):
        torch.save({name: state[name] for name in state if parts[name] == part}, folder / part)
    (folder / f"{stem}{spelling}").write_text(json.dumps({"weight_map": parts}))


@pytest.mark.parametrize("spelling", [".bin", ".fp16.bin", ".bin.index.json", ".bin.index.fp16.json"])
def test_torch_files_hold_the_same(tiny: TinyModel, spelling: str) -> None:
    before = {name: dict(BaseFiles.open(tiny.folder).state(name)) for name in COMPONENTS}
    for name in COMPONENTS:
        stem = "pytorch_model" if name.startswith("text") else "diffusion_pytorch_model"
        save_as_torch(tiny.folder / name, stem, "float16", spelling)
    base = BaseFiles.open(tiny.folder)
    for name in COMPONENTS:
        after = base.state(name)
        assert after.keys() == before[name].keys()
        assert all(np.array_equal(after[key], before[name][key]) for key in after)
    assert any(key.endswith(".bin") for key in base.hash_contents("vae"))


def test_bfloat16_is_read_as_torch_widens_it(tiny: TinyModel) -> None:
    before = dict(BaseFiles.open(tiny.folder).state("vae"))
    save_as_torch(tiny.folder / "vae", "diffusion_pytorch_model", "bfloat16", ".bin")
    after = BaseFiles.open(tiny.folder).state("vae")
    torch = pytest.importorskip("torch")
    for name, value in before.items():
        assert np.array_equal(after[name], torch.from_numpy(value).bfloat16().float().numpy())


def test_full_precision_comes_before_fp16(tiny: TinyModel) -> None:
    from safetensors.numpy import load_file, save_file

    whole = tiny.folder / "unet/diffusion_pytorch_model.safetensors"
    state = {name: value.astype(np.float32) + np.float32(1e-6) for name, value in load_file(whole).items()}
    whole.rename(whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert np.array_equal(BaseFiles.open(tiny.folder).state("unet")["conv_out.bias"], state["conv_out.bias"] - 1e-6)
    save_file(state, whole)
    assert np.array_equal(BaseFiles.open(tiny.folder).state("unet")["conv_out.bias"], state["conv_out.bias"])


def test_a_nine_channel_folder_is_read_as_a_base_with_its_head(tiny: TinyModel) -> None:
    from safetensors.numpy import load_file, save_file

    path = tiny.folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    wide = np.random.default_rng(0).standard_normal((32, 9, 3, 3)).astype(np.float16)
    save_file({**state, "conv_in.weight": wide}, path)
    edit(tiny.folder / "unet/config.json", in_channels=9)
    with pytest.raises(FileFormatError, match="brings its own head"):
        BaseFiles.open(tiny.folder)
    tiny.patch.unlink(), tiny.head.unlink()
    base = BaseFiles.open(tiny.folder)
    assert base.nine_channels and base.has_head and base.patch is None and base.configs["unet"]["in_channels"] == 4
    assert base.unet_patched_state().shape("conv_in.weight") == (32, 4, 3, 3)
    assert np.array_equal(base.state("unet")["conv_in.weight"], wide[:, :4].astype(np.float32))
    assert np.array_equal(base.head(), wide[:, 4:].astype(np.float32))
    assert np.array_equal(base.state("unet")["conv_out.bias"], state["conv_out.bias"].astype(np.float32))


def test_a_vae_given_beside_replaces_the_folders(tiny: TinyModel, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    edit(other.folder / "vae/config.json", scaling_factor=0.5)
    for given in (other.folder, other.folder / "vae"):
        base = BaseFiles.open(tiny.folder, vae=given)
        truth = BaseFiles.open(other.folder)
        assert base.scaling_factor == 0.5
        assert all(np.array_equal(value, truth.state("vae")[name]) for name, value in base.state("vae").items())
        assert base.hash_contents("vae") == truth.hash_contents("vae")
        assert base.hash_contents("unet") != truth.hash_contents("unet")


def test_hashes_of_a_component_are_its_own_files(tiny: TinyModel) -> None:
    base = BaseFiles.open(tiny.folder)
    unet = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert base.hash_contents("unet").keys() == {*unet, "patch"}
    assert base.hash_contents("unet_raw").keys() == unet
    assert base.hash_contents("inpaint_head").keys() == {"inpaint_head"}
    assert "tokenizer_2/merges.txt" in base.hash_contents("tokenizer")
    parts = (*COMPONENTS, "tokenizer", "inpaint_head")
    assert base.hash_contents() == {key: value for part in parts for key, value in base.hash_contents(part).items()}


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ],
)
def test_every_spelling_of_an_index_is_read(tiny: TinyModel, index: str) -> None:
    from safetensors.numpy import load_file, save_file

    whole = tiny.folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    place = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for part in set(place.values()):
        save_file({name: tensors[name] for name in tensors if place[name] == part}, whole.parent / part)
    (whole.parent / index).write_text(json.dumps({"weight_map": place}))
    state = BaseFiles.open(tiny.folder).state("vae")
    assert {name: np.array_equal(state[name], tensors[name].astype(np.float32)) for name in state} == dict.fromkeys(
        tensors, True
    )
    (whole.parent / index).write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    with pytest.raises(FileFormatError, match="does not name"):
        BaseFiles.open(tiny.folder)


def test_shards_are_joined(tiny: TinyModel) -> None:
    from safetensors.numpy import load_file, save_file

    whole = tiny.folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    place = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for part in set(place.values()):
        save_file({name: tensors[name] for name in names if place[name] == part}, whole.parent / part)
    whole.unlink()
    (whole.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    assert BaseFiles.open(tiny.folder).state("vae").keys() == tensors.keys()
    (whole.parent / "part-1.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"part-1\.safetensors are missing"):
        BaseFiles.open(tiny.folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, r"shape \(32, 4, 3, 3\), but its config says 9"),
        ("unet/config.json", {"in_channels": 8}, "8 input channels, expected 4"),
        ("vae/config.json", {"latent_channels": 16}, "its VAE is not SDXL's"),
        ("vae/config.json", {"scaling_factor": None}, "no scaling_factor"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, r"Stable Diffusion 1\.x or 2\.x"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "Stable Diffusion 3 model"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "a Flux model"),
        ("model_index.json", {"_class_name": "KolorsPipeline"}, "a KolorsPipeline model"),
        ("model_index.json", {"text_encoder": [None, None]}, "an SDXL refiner"),
        ("unet/config.json", {"addition_embed_type": None}, "not an SDXL UNet"),
        ("unet/config.json", {"cross_attention_dim": 768}, "cross_attention_dim is 768"),
        ("unet/config.json", {"mid_block_type": None}, "block types None"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
    ],
)
def test_other_models_are_refused(tiny: TinyModel, file: str, changes: dict[str, Any], message: str) -> None:
    edit(tiny.folder / file, **changes)
    with pytest.raises(FileFormatError, match=message):
        BaseFiles.open(tiny.folder)


def test_missing_parts_are_named(tiny: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no model_index\.json"):
        BaseFiles.open(tmp_path)
    with pytest.raises(FileFormatError, match="it does not exist"):
        BaseFiles.open(tmp_path / "none")
    with pytest.raises(FileFormatError, match="one component of a model; give the folder above"):
        BaseFiles.open(tiny.folder / "unet")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FileFormatError, match=r"name the file: model\.safetensors"):
        BaseFiles.open(tmp_path)
    with pytest.raises(FileFormatError, match=r"model\.safetensors: truncated, or neither"):
        BaseFiles.open(tmp_path / "model.safetensors")
    with pytest.raises(FileFormatError, match=r"none\.patch: no such file"):
        BaseFiles.open(tiny.folder, patch=tmp_path / "none.patch")
    (tiny.folder / "text_encoder_2/model.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"text_encoder_2/model\.safetensors is missing"):
        BaseFiles.open(tiny.folder)


def test_a_patch_without_head_is_refused(tiny: TinyModel) -> None:
    tiny.head.unlink()
    with pytest.raises(FileFormatError, match="patch without its head"):
        BaseFiles.open(tiny.folder)


def test_truncated_weights_say_so(tiny: TinyModel) -> None:
    path = tiny.folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match="truncated"):
        BaseFiles.open(tiny.folder).state("unet")


def test_a_patch_of_another_width_lists_shapes(tiny: TinyModel, golden: Path) -> None:
    base = BaseFiles.open(tiny.folder, patch=golden / "tiny.fooocus.patch")
    with pytest.raises(FileFormatError, match=r"shapes differ \(diffusion_model\..*against"):
        base.unet_patched_state()
    with pytest.raises(FileFormatError, match="320 channels does not fit the base's 32"):
        BaseFiles.open(tiny.folder, head=golden / "inpaint_head.pth").head()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("text_encoder", {"hidden_size": None}, "hidden_size is None, expected a whole number"),
        ("text_encoder_2", {"hidden_act": "relu"}, "hidden_act is 'relu', expected 'quick_gelu' or 'gelu'"),
        ("text_encoder", {"num_attention_heads": 3}, "num_attention_heads is 3, expected a divisor of hidden_size 16"),
        ("text_encoder", {"max_position_embeddings": 64}, "max_position_embeddings is 64, expected 77"),
        ("text_encoder", {"num_hidden_layers": 3}, "layers.2.mlp.fc1.weight is missing; weights and config"),
        ("text_encoder_2", {"eos_token_id": None}, "eos_token_id is None"),
        ("unet", {"sample_size": "128"}, "sample_size is '128', expected a whole number"),
        ("unet", {"sample_size": 9}, "sample_size is 9, expected a multiple of 4"),
        ("unet", {"block_out_channels": [32, 32]}, "down_block_types is .*expected 2 entries"),
        ("unet", {"block_out_channels": "wide"}, "block_out_channels is 'wide', expected a list"),
        ("unet", {"block_out_channels": [64, 32, 32]}, "conv_in.weight has shape .*, but its config.json says"),
        ("unet", {"down_block_types": [["x"], 1, 2]}, "down_block_types is"),
        ("unet", {"norm_num_groups": 5}, "norm_num_groups is 5, expected a divisor"),
        ("unet", {"attention_head_dim": [3, 2, 4]}, "attention_head_dim is .* that divide"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ("unet", {"transformer_layers_per_block": [1, [1], [2]]}, "reverse_transformer_layers_per_block is None"),
        ("unet", {"transformer_layers_per_block": [1, [1, 1], 2]}, "one for each layer of a block"),
        ("unet", {"projection_class_embeddings_input_dim": 60}, "60, expected 64: text_encoder_2's projection_dim"),
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256, expected null"),
        ("vae", {"block_out_channels": [8, 8]}, "block_out_channels is .*expected 4 entries"),
        ("vae", {"scaling_factor": True}, "scaling_factor is True, expected a number above 0"),
        ("vae", {"mid_block_add_attention": False}, "mid_block_add_attention is False, expected true"),
        ("scheduler", {"beta_schedule": "linear"}, "beta_schedule is 'linear', expected 'scaled_linear'"),
        ("scheduler", {"beta_start": 0.0001}, "beta_start is 0.0001, expected SDXL's 0.00085"),
        ("scheduler", {"beta_end": 0.02}, "beta_end is 0.02"),
        ("scheduler", {"num_train_timesteps": 4000}, "num_train_timesteps is 4000, expected 1000"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("scheduler", {"_class_name": "EDMEulerScheduler"}, "_class_name is 'EDMEulerScheduler'"),
    ],
)
def test_damaged_configs_are_named(tiny: TinyModel, file: str, changes: dict[str, Any], message: str) -> None:
    name = "scheduler_config.json" if file == "scheduler" else "config.json"
    edit(tiny.folder / file / name, **changes)
    with pytest.raises(FileFormatError, match=message) as caught:
        BaseFiles.open(tiny.folder)
    assert file in str(caught.value)


REQUIRED = {
    "unet": ["sample_size", "block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim",
             "addition_time_embed_dim", "projection_class_embeddings_input_dim"],
    "vae": ["block_out_channels", "down_block_types", "up_block_types"],
    "text_encoder": ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                     "max_position_embeddings", "hidden_act"],
    "text_encoder_2": ["hidden_size", "projection_dim"],
}  # fmt: skip


@pytest.mark.parametrize(("component", "field"), [(name, field) for name in REQUIRED for field in REQUIRED[name]])
def test_absent_fields_are_named(embedded: Path, component: str, field: str) -> None:
    path = embedded / component / "config.json"
    config = json.loads(path.read_text())
    del config[field]
    path.write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match=rf"{component}/config\.json: {field} is missing, expected "):
        BaseFiles.open(embedded)


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    """A copy of the embedded base that a test may damage."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "embedded"))


ODD: list[Any] = [None, True, 0, -1, 10**30, 1e400, 2.5, "", "x", [], [1], [[1]], {}]
FILES = ["unet/config.json", "vae/config.json", "text_encoder_2/config.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("file", [*FILES, "tokenizer/tokenizer_config.json", "model_index.json"])
def test_no_value_of_a_config_is_a_traceback(embedded: Path, file: str) -> None:
    path = embedded / file
    text = path.read_text()
    record = json.loads(text)
    changed = [
        {**record, field: ODD[(number + step) % len(ODD)]} for step, field in enumerate(record) for number in (0, 5, 9)
    ]
    for damaged in [*map(json.dumps, changed), "", "[]", text[: len(text) // 2], "[" * 100_000, "1" * 5000]:
        path.write_text(damaged)
        with contextlib.suppress(FileFormatError):
            base = BaseFiles.open(embedded)
            assert base.native_side > 0 and base.divisor > 0 and base.tokenizers.pad_token("tokenizer")


def test_deeply_nested_json_is_a_damaged_file(embedded: Path) -> None:
    (embedded / "unet" / "config.json").write_text("[" * 100_000)
    with pytest.raises(FileFormatError, match=r"unet/config\.json cannot be read as JSON"):
        BaseFiles.open(embedded)


def test_a_damaged_vae_override_is_named_by_its_own_file(tiny: TinyModel, embedded: Path) -> None:
    edit(embedded / "vae" / "config.json", norm_num_groups="x")
    with pytest.raises(FileFormatError, match=r"embedded/vae/config\.json: norm_num_groups is 'x'"):
        BaseFiles.open(tiny.folder, vae=embedded)


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make files of this name unreadable. Permissions do not suffice, since the tests may run as root."""
    usual = Path.open

    def refused(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return usual(self, *args, **options)

    monkeypatch.setattr(Path, "open", refused)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "inpaint_head.pth", "vocab.json"])
def test_files_that_may_not_be_read_are_named(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    base = BaseFiles.open(tiny.folder)
    forbid(monkeypatch, name)
    with pytest.raises(FileFormatError, match=rf"{name}: cannot be read \(Permission denied\); give yourself"):
        base.hash_contents()
    if name.endswith(".safetensors"):
        with pytest.raises(FileFormatError, match=rf"unet/{name}: cannot be read \(Permission denied\)"):
            BaseFiles.open(tiny.folder)
    elif name.endswith(".pth"):
        with pytest.raises(FileFormatError, match=rf"{name}: cannot be read \(Permission denied\)"):
            base.head()


def test_a_folder_that_may_not_be_entered_is_named(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Path.is_file

    def refused(self: Path) -> bool:
        if self.parent.name == "vae":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return usual(self)

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(FileFormatError, match=r"vae/config\.json: cannot be read \(Permission denied\)"):
        BaseFiles.open(tiny.folder)


# Folders and files as other tools leave them


def copy_as(tiny: TinyModel, component: str, *names: str, take: bool = False) -> None:
    """Give a component's weights further names; take: the plain name away."""
    folder = tiny.folder / component
    plain = next(folder.glob("*.safetensors"))
    for name in names:
        shutil.copy(plain, folder / name)
    if take:
        plain.unlink()


@pytest.mark.parametrize(
    ("names", "take", "chosen", "told"),
    [
        (("fp16",), False, "", ""),
        (("non_ema",), False, "", "beside it non_ema is not"),
        (("bf16", "fp16", "non_ema"), False, "", "beside it fp16, bf16, non_ema is not"),
        (("bf16", "fp16"), True, "fp16", "model.fp16.safetensors is used; beside it bf16 is not"),
        (("bf16",), True, "bf16", ""),
        (("non_ema", "pruned"), True, "pruned", "beside it non_ema is not"),
        (("non_ema",), True, "non_ema", "weights for further training; pictures may be worse"),
        (("fp16.non_ema-00001-of-00002",), False, "", ""),
    ],
)
def test_of_several_variants_one_is_chosen_and_said(
    tiny: TinyModel, names: tuple[str, ...], take: bool, chosen: str, told: str
) -> None:
    stem = "diffusion_pytorch_model"
    copy_as(tiny, "unet", *(f"{stem}.{name}.safetensors" for name in names), take=take)
    (file,) = find_weight_files(tiny.folder / "unet", "unet")
    assert file.name == f"{stem}{f'.{chosen}' if chosen else ''}.safetensors"
    remarks = BaseFiles.open(tiny.folder).remarks
    assert len(remarks) == bool(told) and told in " ".join(remarks)


def test_a_folder_of_the_hubs_cache_means_its_snapshot(tiny: TinyModel, tmp_path: Path) -> None:
    """As the hub's client leaves it: snapshots of links into blobs/, refs/main naming one of them."""
    cache = tmp_path / "hub" / "models--stabilityai--tiny-xl"
    for name in ("abc123", "def456"):
        shutil.copytree(tiny.folder, cache / "snapshots" / name)
    (cache / "blobs").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def456")
    base = BaseFiles.open(cache)
    assert (base.folder, base.name) == (cache / "snapshots" / "def456", "tiny-xl")
    assert base.remarks == (f"{cache}: a folder of the hub's cache; def456 in it is used",)
    (cache / "refs" / "main").unlink()
    with pytest.raises(
        FileFormatError, match="2 snapshots and no refs/main that names one; give one of abc123, def456"
    ):
        BaseFiles.open(cache)
    shutil.rmtree(cache / "snapshots" / "def456")
    assert BaseFiles.open(cache / "snapshots").folder.name == "abc123"
    shutil.rmtree(cache / "snapshots" / "abc123")
    with pytest.raises(FileFormatError, match="without a snapshot; download the model again"):
        BaseFiles.open(cache)


def test_a_ref_cannot_lead_out_of_the_cache(tiny: TinyModel, tmp_path: Path) -> None:
    cache = tmp_path / "models--x--y"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(f"../../{tiny.folder.name}")
    with pytest.raises(FileFormatError, match="without a snapshot"):
        BaseFiles.open(cache)


def test_a_name_of_the_hub_is_told_to_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFormatError, match="hf download stabilityai/sdxl --local-dir DIR"):
        BaseFiles.open("stabilityai/sdxl")


def test_a_base_without_patch_and_head_says_where_they_are(tiny: TinyModel) -> None:
    assert BaseFiles.open(tiny.folder).remarks == ()
    for file in (tiny.patch, tiny.head):
        file.unlink()
    (remark,) = BaseFiles.open(tiny.folder).remarks
    for told in ("no inpainting base", "--patch inpaint_v26.fooocus.patch", "--head fooocus_inpaint_head.pth"):
        assert told in remark
    assert "https://huggingface.co/lllyasviel/fooocus_inpaint" in remark and "openrail" in remark


def test_an_unfinished_download_is_named(tiny: TinyModel, tmp_path: Path) -> None:
    weights = tiny.folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(FileFormatError, match=r"is missing \(diffusion_\S+ lead nowhere: the download is not"):
        BaseFiles.open(tiny.folder)


def test_the_whole_cache_of_the_hub_is_named(tmp_path: Path) -> None:
    for name in ("models--a--b", "models--c--d"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileFormatError, match="it is the hub's cache; give the folder of one model in it: models--a"):
        BaseFiles.open(tmp_path)
