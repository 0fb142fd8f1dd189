"""Single-file SDXL: the same tensors and configs as the diffusers folder it was made from."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core import single_file
from dreammix_trt.core.checkpoint import COMPONENTS, EMBEDDED, BaseFiles
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.tensors import Weights, open_tensors
from tests.support.sgm import sgm_state, write_header

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

Arrays = dict[str, np.ndarray]
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
    "sample_size": 1024,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "vocab_size": 49408,
    "eos_token_id": 2,
    "bos_token_id": 0,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
    "vocab_size": 49408,
    "eos_token_id": 2,
    "bos_token_id": 0,
}
SMALL_UNET = {
    **SDXL_UNET,
    "block_out_channels": (64, 128, 256),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 192,
    "projection_class_embeddings_input_dim": 128 + 6 * 256,
}
SMALL_VAE = {**SDXL_VAE, "block_out_channels": (32, 64, 64, 64)}
SMALL_L = {**CLIP_L, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256, "num_hidden_layers": 2}
SMALL_L |= {"projection_dim": 64}
SMALL_G = {**CLIP_G, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "num_hidden_layers": 3}
SMALL_G |= {"projection_dim": 128}


def modules_of(unet: Any, vae: Any, first: Any, second: Any) -> dict[str, Any]:
    with torch.device("meta"):
        return {
            "unet": diffusers.UNet2DConditionModel(**unet),
            "vae": diffusers.AutoencoderKL(**vae),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**first)),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**second)),
        }


def states_of(modules: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Meta tensors by classic names."""
    found = {name: dict(module.state_dict()) for name, module in modules.items()}
    for name in ("text_encoder", "text_encoder_2"):
        found[name] = {
            key if key.startswith("text_") else f"text_model.{key}": value
            for key, value in found[name].items()
            if not key.endswith("position_ids")
        }
    return found


@pytest.fixture(scope="session")
def full_size() -> dict[str, Any]:
    return modules_of(SDXL_UNET, SDXL_VAE, CLIP_L, CLIP_G)


@pytest.fixture(scope="session")
def small() -> tuple[dict[str, Any], dict[str, Arrays]]:
    """A reduced SDXL's modules (without weights) and random weights, float16."""
    modules = modules_of(SMALL_UNET, SMALL_VAE, SMALL_L, SMALL_G)
    rng = np.random.default_rng(0)
    states = {
        name: {key: rng.standard_normal(tuple(value.shape), np.float32).astype(np.float16) for key, value in s.items()}
        for name, s in states_of(modules).items()
    }
    return modules, states


@pytest.fixture(scope="session")
def small_file(small: tuple[dict[str, Any], dict[str, Arrays]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("single") / "small.safetensors", sgm_state(small[1], 2, np.concatenate))


@pytest.fixture
def micro_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model's head size and groups are not SDXL's, and a single file does not contain them."""
    monkeypatch.setattr(single_file, "HEAD_SIZE", 32)
    monkeypatch.setattr(single_file, "TEXT_HEAD_SIZE", 16)
    monkeypatch.setattr(single_file, "GROUPS", 16)


def write(path: Path, tensors: Arrays) -> Path:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


def micro_checkpoint() -> dict[str, Any]:
    """The embedded model under sgm names, torch tensors."""
    base = BaseFiles.open()
    states = {name: {key: torch.from_numpy(value) for key, value in base.state(name).items()} for name in COMPONENTS}
    return sgm_state(states, base.configs["unet"]["layers_per_block"], torch.cat)


def assert_same(found: Weights, truth: Any) -> None:
    assert sorted(found) == sorted(truth)
    for name, value in found.items():
        assert value.dtype == np.float32 and value.flags.c_contiguous and value.shape == found.shape(name), name
        assert np.array_equal(value, truth[name]), name


def save_as_ckpt(path: Path, tensors: dict[str, Any]) -> Path:
    torch.save({"state_dict": tensors, "global_step": 7, "epoch": None}, path)
    return path


def save_as_safetensors(path: Path, tensors: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


@pytest.mark.usefixtures("micro_sizes")
def test_a_projection_that_is_a_linear_layers_is_not_turned(tmp_path: Path) -> None:
    """As diffusers' script writes it: `text_projection.weight`, as transformers has it; the parameter is turned."""
    place, tensors = "conditioner.embedders.1.model.text_projection", micro_checkpoint()
    linear = {key: value for key, value in tensors.items() if key != place} | {f"{place}.weight": tensors[place].T}
    truth = BaseFiles.open().state("text_encoder_2")["text_projection.weight"]
    assert not np.array_equal(truth, truth.T)
    for name, held in (("parameter", tensors), ("linear", linear)):
        file = save_as_safetensors(tmp_path / f"{name}.safetensors", held)
        found = BaseFiles.open(file, tokenizer=EMBEDDED).state("text_encoder_2")["text_projection.weight"]
        assert np.array_equal(found, truth), name


@pytest.mark.usefixtures("micro_sizes")
def test_a_first_text_encoder_of_transformers_5_is_read(tmp_path: Path) -> None:
    place, tensors = "conditioner.embedders.0.transformer.", micro_checkpoint()
    short = {key.replace(f"{place}text_model.", place): value for key, value in tensors.items()}
    assert short.keys() != tensors.keys()
    base = BaseFiles.open(save_as_safetensors(tmp_path / "x.safetensors", short), tokenizer=EMBEDDED)
    assert_same(base.state("text_encoder"), BaseFiles.open().state("text_encoder"))


@pytest.mark.parametrize(("suffix", "save"), [("ckpt", save_as_ckpt), ("safetensors", save_as_safetensors)])
@pytest.mark.usefixtures("micro_sizes")
def test_the_embedded_model_in_one_file_is_the_same(tmp_path: Path, suffix: str, save: Callable[..., Path]) -> None:
    extra = {
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.loss.logvar": torch.zeros(1),
        "denoiser.sigmas": torch.zeros(3),
    }
    path = save(tmp_path / f"micro.{suffix}", {**micro_checkpoint(), **extra})
    base, truth = BaseFiles.open(path, tokenizer=EMBEDDED), BaseFiles.open()
    for name in COMPONENTS:
        assert_same(base.state(name), truth.state(name))
    for name in (
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "addition_time_embed_dim",
        "norm_num_groups",
        "transformer_layers_per_block",
    ):
        assert base.configs["unet"][name] == truth.configs["unet"][name], name
    heads, wanted = (config.configs["unet"]["attention_head_dim"] for config in (base, truth))
    assert heads[1:] == wanted[1:]  # the first block has no attention
    for name in ("hidden_size", "num_attention_heads", "hidden_act", "projection_dim", "vocab_size"):
        for encoder in ("text_encoder", "text_encoder_2"):
            assert base.configs[encoder][name] == truth.configs[encoder][name], name
    patched = BaseFiles.open(path, truth.patch, truth.head_file, tokenizer=EMBEDDED).unet_patched_state()
    assert_same(patched, truth.unet_patched_state())


@pytest.mark.usefixtures("micro_sizes")
def test_diffusers_reads_the_same_out_of_the_file(tmp_path: Path) -> None:
    from diffusers.loaders import single_file_utils as theirs

    checkpoint = micro_checkpoint()
    base = BaseFiles.open(save_as_safetensors(tmp_path / "micro.safetensors", checkpoint), tokenizer=EMBEDDED)
    configs = BaseFiles.open().configs
    numbers = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(checkpoint), configs["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(checkpoint), configs["vae"]),
    }
    model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**configs["text_encoder_2"]))
    numbers["text_encoder_2"] = theirs.convert_open_clip_checkpoint(model, checkpoint, "conditioner.embedders.1.model.")
    for name, state in numbers.items():
        found = base.state(name)
        assert_same(found, {key: value.numpy().reshape(found.shape(key)) for key, value in state.items()})


def test_configs_come_from_the_shapes(small: tuple[dict[str, Any], dict[str, Arrays]], small_file: Path) -> None:
    modules, states = small
    base = BaseFiles.open(small_file)
    for name in COMPONENTS:
        assert_same(base.state(name), states[name])
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(dict(base.configs["unet"]))
        vae = diffusers.AutoencoderKL.from_config(dict(base.configs["vae"]))
    for found, truth in ((unet, modules["unet"]), (vae, modules["vae"])):
        assert plain(found.config) == plain(truth.config)
    for name in ("text_encoder", "text_encoder_2"):
        config = transformers.CLIPTextConfig(**base.configs[name]).to_dict()
        truth = modules[name].config.to_dict()
        assert {k: v for k, v in config.items() if k in CLIP_L} == {k: v for k, v in truth.items() if k in CLIP_L}
    assert (base.native_side, base.divisor, base.scaling_factor, base.latent_channels) == (1024, 32, 0.13025, 4)
    assert not base.has_head and base.configs["scheduler"] == {"prediction_type": "epsilon"}


def plain(config: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dict(config).items() if not k.startswith("_")}


def test_full_size_opens_by_its_header_alone(full_size: dict[str, Any], tmp_path: Path) -> None:
    states = states_of(full_size)
    tensors = sgm_state(states, 2, torch.cat)
    path = write_header(tmp_path / "sdxl.safetensors", {name: tuple(v.shape) for name, v in tensors.items()})
    assert path.stat().st_size > 6.9e9
    tracemalloc.start()
    base = BaseFiles.open(path)
    found = {name: base.state(name) for name in COMPONENTS}
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert {name: len(state) for name, state in found.items()} == {
        "unet": 1680,
        "vae": 248,
        "text_encoder": 196,
        "text_encoder_2": 517,
    }
    for name, state in found.items():
        assert {key: state.shape(key) for key in state} == {k: tuple(v.shape) for k, v in states[name].items()}
    for key, value in SDXL_UNET.items():
        assert base.configs["unet"][key] == (list(value) if isinstance(value, tuple) else value), key
    assert found["unet"]["conv_in.weight"].shape == (320, 4, 3, 3)


def test_an_inpainting_unet_is_a_base_with_its_own_head(
    small: tuple[dict[str, Any], dict[str, Arrays]], tmp_path: Path
) -> None:
    tensors = sgm_state(small[1], 2, np.concatenate)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide = np.random.default_rng(3).standard_normal((64, 9, 3, 3)).astype(np.float32)
    path = write(tmp_path / "inpainting.safetensors", {**tensors, key: wide})
    base = BaseFiles.open(path)
    assert base.nine_channels and base.has_head and base.head_padding == "zeros"
    assert base.configs["unet"]["in_channels"] == 4
    # one convolution over nine channels is the sum of the UNet's over the latent and the head's over mask and picture
    inputs = torch.from_numpy(np.random.default_rng(4).standard_normal((1, 9, 6, 6)).astype(np.float32))
    conv = torch.nn.functional.conv2d
    parts = torch.from_numpy(base.unet_patched_state()["conv_in.weight"]), torch.from_numpy(base.head())
    both = conv(inputs[:, :4], parts[0], padding=1) + conv(inputs[:, 4:], parts[1], padding=1)
    torch.testing.assert_close(both, conv(inputs, torch.from_numpy(wide), padding=1))
    assert base.hash_contents("inpaint_head") == base.hash_contents("unet")
    for given in ({"patch": EMBEDDED / "micro.fooocus.patch"}, {"head": EMBEDDED / "inpaint_head.pth"}):
        with pytest.raises(FileFormatError, match="brings its own head"):
            BaseFiles.open(path, **given)


def test_a_vae_is_taken_from_anywhere(
    small: tuple[dict[str, Any], dict[str, Arrays]], small_file: Path, tmp_path: Path
) -> None:
    other = {name: (value * 2).astype(np.float16) for name, value in small[1]["vae"].items()}
    sgm = {
        name.removeprefix("first_stage_model."): value
        for name, value in sgm_state({**small[1], "vae": other}, 2, np.concatenate).items()
        if name.startswith("first_stage_model.")
    }
    folder = tmp_path / "pipeline" / "vae"
    small[0]["vae"].save_config(folder)
    config = (folder / "config.json").read_text().replace("0.13025", "0.2")
    (folder / "config.json").write_text(config)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for modern, name in old.items():
        other = {key.replace(f".{modern}.", f".{name}."): value for key, value in other.items()}
    files = {
        "sgm": write(tmp_path / "sgm.safetensors", sgm),
        "old names": write(tmp_path / "old.safetensors", other),
        "whole": write(tmp_path / "whole.safetensors", {f"first_stage_model.{k}": v for k, v in sgm.items()}),
        "folder": write(folder / "diffusion_pytorch_model.safetensors", other).parent,
        "pipeline": folder.parent,
    }
    without = {k: v for k, v in shapes_of(small_file).items() if not k.startswith("first_stage_model.")}
    base_file = write_header(tmp_path / "without.safetensors", without)
    truth = {name: value * np.float32(2) for name, value in small[1]["vae"].items()}
    for kind, path in files.items():
        base = BaseFiles.open(base_file, vae=path)
        assert_same(base.state("vae"), {name: value.astype(np.float32) for name, value in truth.items()})
        assert base.scaling_factor == (0.2 if kind in ("folder", "pipeline") else 0.13025)
        assert base.hash_contents("vae").keys() == (
            {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"} if path.is_dir() else {"vae"}
        )
    with pytest.raises(FileFormatError, match="it has no VAE"):
        BaseFiles.open(base_file)
    with pytest.raises(FileFormatError, match="no such VAE"):
        BaseFiles.open(base_file, vae=tmp_path / "none")


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    weights = open_tensors(path)
    return {name: weights.shape(name) for name in weights}


def test_missing_foreign_and_marked_tensors_are_named(small_file: Path, tmp_path: Path) -> None:
    whole = shapes_of(small_file)
    unet = "model.diffusion_model"
    norm, deep = f"{unet}.input_blocks.4.1.norm.weight", f"{unet}.input_blocks.7.1.transformer_blocks.1."
    layer = "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.bias"
    embedding = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
    cases: list[tuple[dict[str, tuple[int, ...]], str]] = [
        ({k: v for k, v in whole.items() if k != norm}, r"UNet lacks 1 of its \d+ tensors: .*input_blocks\.4\.1\.norm"),
        (
            {k: v for k, v in whole.items() if k != layer},
            r"second text encoder lacks 1 of .*resblocks\.1\.mlp\.c_fc\.b",
        ),
        ({k: v for k, v in whole.items() if k != embedding}, r"first text encoder lacks 1 of its 37 tensors"),
        ({k: v for k, v in whole.items() if "decoder.mid" not in k}, r"VAE lacks 26 of its"),
        ({k: v for k, v in whole.items() if not k.startswith(deep)}, r"different widths or transformer depths"),
        ({k: v for k, v in whole.items() if "input_blocks.5." not in k}, r"different widths|lacks"),
        ({k: v for k, v in whole.items() if "label_emb" not in k}, r"not SDXL's \(no label_emb"),
        ({**whole, f"{unet}.time_embed.cond_proj.weight": (1,)}, r"SDXL's does not have: time_embed\.cond_proj"),
        ({**whole, "v_pred": (1,)}, r"prediction_type is 'v_prediction'"),
        ({**whole, "ztsnr": (1,)}, r"prediction_type is 'v_prediction'"),
        ({**whole, f"{unet}.input_blocks.0.0.weight": (64, 8, 3, 3)}, r"takes 8 input channels"),
    ]
    for number, (shapes, message) in enumerate(cases):
        with pytest.raises(FileFormatError, match=message):
            BaseFiles.open(write_header(tmp_path / f"{number}.safetensors", shapes))


def test_a_not_a_number_is_found_where_it_is(small: tuple[dict[str, Any], dict[str, Arrays]], tmp_path: Path) -> None:
    whole = sgm_state(small[1], 2, np.concatenate)
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"
    whole[key][200] = np.nan  # in the third of the keys
    base = BaseFiles.open(write(tmp_path / "nan.safetensors", whole))
    state = base.state("text_encoder_2")
    assert np.isfinite(state["text_model.encoder.layers.0.self_attn.q_proj.bias"]).all()
    with pytest.raises(FileFormatError, match=r"nan\.safetensors: tensor '.*in_proj_bias' holds NaN"):
        state["text_model.encoder.layers.0.self_attn.k_proj.bias"]


def test_quantised_and_cut_files_say_so(small_file: Path, tmp_path: Path) -> None:
    shapes = shapes_of(small_file)
    with pytest.raises(FileFormatError, match=r"is stored as float8_e4m3fn; save the weights as fp16"):
        BaseFiles.open(write_header(tmp_path / "f8.safetensors", shapes, "F8_E4M3", 1))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(small_file.read_bytes()[:-1000])
    with pytest.raises(FileFormatError, match=r"cut\.safetensors: truncated: \d+ bytes, its header describes \d+"):
        BaseFiles.open(cut)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cond_stage_model.transformer.text_model.x", "model.diffusion_model.y"], r"Stable Diffusion 1\.x"),
        (["cond_stage_model.model.transformer.x", "model.diffusion_model.y"], r"Stable Diffusion 2\.x"),
        (["conditioner.embedders.0.model.x", "model.diffusion_model.y", "first_stage_model.z"], "refiner"),
        (["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "a Flux model"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a Flux model"),
        (["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.1.attentions.0.proj_in.lora_A.weight"], "a LoRA"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "a VAE"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight"], "a VAE"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet without text encoders"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "a UNet without text encoders"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder alone"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["head"], "an inpaint head"),
        (["layer.0.weight", "layer.1.weight"], r"not a model known here .*layer\.0\.weight, layer\.1\.weight"),
        ([], "without named tensors"),
    ],
)
def test_other_files_are_recognised(tmp_path: Path, names: list[str], message: str) -> None:
    path = write_header(tmp_path / "other.safetensors", {name: (2, 2) for name in names})
    with pytest.raises(FileFormatError, match=rf"other\.safetensors: this is .*{message}"):
        BaseFiles.open(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF\3\0\0\0 more", "GGUF"),
        (b"version https://git-lfs", "git lfs pull"),
        (b"\x80\x02}q\0. old", "old format"),
    ],
)
def test_files_that_are_no_tensors(tmp_path: Path, start: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(start)
    with pytest.raises(FileFormatError, match=message):
        BaseFiles.open(tmp_path / "x.safetensors")


def test_a_patch_file_is_no_base() -> None:
    with pytest.raises(FileFormatError, match="a Fooocus patch"):
        BaseFiles.open(EMBEDDED / "micro.fooocus.patch")


def test_odd_widths_ask_for_the_folder(tmp_path: Path) -> None:
    path = save_as_safetensors(tmp_path / "micro.safetensors", micro_checkpoint())
    with pytest.raises(FileFormatError, match=r"\d+ wide, not a multiple of CLIP's head size 64"):
        BaseFiles.open(path, tokenizer=EMBEDDED)


@pytest.mark.usefixtures("micro_sizes")
def test_a_vocabulary_of_its_own_needs_its_tokenizer(tmp_path: Path) -> None:
    path = save_as_safetensors(tmp_path / "micro.safetensors", micro_checkpoint())
    with pytest.raises(FileFormatError, match="know 992 tokens, CLIP's tokenizer 49408"):
        BaseFiles.open(path)
