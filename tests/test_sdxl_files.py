"""The files that the benchmark at full size writes, held against diffusers, transformers, peft and torch."""

from __future__ import annotations

import copy
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import _sdxl_files as files
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

MINI = files.sdxl_configs(0.1, depth=1, side=64)
LITE = {**MINI, "unet": {**MINI["unet"], "layers_per_block": 1}}
State = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write_folder(tmp_path_factory.mktemp("sdxl") / "folder", MINI)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write_single_file(tmp_path_factory.mktemp("sdxl") / "single.safetensors", MINI)


def load(path: Path) -> State:
    from safetensors.torch import load_file

    return dict(load_file(path))


def model(folder: Path, name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A component as its own library loads it, float32, with what the library has to say about its names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
    kind = kinds[files.COMPONENTS.index(name)]
    made, info = kind.from_pretrained(folder / name, output_loading_info=True, **options)
    return made.float().eval(), info


def test_full_size_is_sdxl() -> None:
    configs = files.sdxl_configs()
    counts = {name: files.shapes_of(name, configs[name]).values() for name in files.COMPONENTS}
    assert {name: (len(shapes), sum(map(math.prod, shapes))) for name, shapes in counts.items()} == {
        "unet": (1680, 2_567_463_684),
        "vae": (248, 83_653_863),
        "text_encoder": (196, 123_060_480),
        "text_encoder_2": (517, 694_659_840),
    }
    assert len(files.single_file_entries(configs, 0, "float16")) == 2515
    everything, v26 = (files.patch_keys(configs["unet"], keys) for keys in ("all", "v26"))
    assert (len(everything), len(v26)) == (1680, 960)
    assert v26.items() <= everything.items()


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2, 0.5])
def test_other_widths_keep_topology_and_head_size(width: float) -> None:
    from dreammix_trt.core.keymap import sgm_to_diffusers

    configs = files.sdxl_configs(width)
    shapes = files.shapes_of("unet", configs["unet"])
    assert len(shapes) == 1680
    assert set(sgm_to_diffusers(configs["unet"]).values()) == set(shapes)
    channels, heads = configs["unet"]["block_out_channels"], configs["unet"]["attention_head_dim"]
    assert [n // m for n, m in zip(channels[1:], heads[1:], strict=True)] == [64, 64]


def test_diffusers_converters_make_the_folder_of_the_single_file(folder: Path, single: Path) -> None:
    from diffusers.loaders import single_file_utils as oracle
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        second = CLIPTextModelWithProjection(CLIPTextConfig(**MINI["text_encoder_2"]))
    converted = {
        "unet": oracle.convert_ldm_unet_checkpoint(load(single), MINI["unet"]),
        "vae": oracle.convert_ldm_vae_checkpoint(load(single), MINI["vae"]),
        "text_encoder": oracle.convert_ldm_clip_checkpoint(load(single)),
        "text_encoder_2": oracle.convert_open_clip_checkpoint(
            second, load(single), prefix="conditioner.embedders.1.model."
        ),
    }
    assert converted["text_encoder"].pop("text_model.embeddings.position_ids").tolist() == [list(range(77))]
    for name, state in converted.items():
        [file] = (folder / name).glob("*.safetensors")
        wanted = load(file)
        assert state.keys() == wanted.keys()
        differing = [key for key in wanted if not torch.equal(state[key], wanted[key])]
        assert not differing


@pytest.mark.parametrize(("channels", "kind"), [(4, "xl_base"), (9, "xl_inpaint")])
def test_diffusers_recognises_the_single_file(channels: int, kind: str) -> None:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    configs = files.sdxl_configs(0.1)
    configs["unet"]["in_channels"] = channels
    assert infer_diffusers_model_type(files.single_file_entries(configs, 0, "float16")) == kind


def test_patch_and_head_are_found_beside_a_single_file(tmp_path: Path) -> None:
    base = files.write_single_file(tmp_path / "sdxl" / "sd_xl_base_1.0.safetensors", MINI)
    patch = files.write_patch(tmp_path / "sdxl" / "inpaint_v26.fooocus.patch", MINI)
    files.write_tokenizers(tmp_path / "tokenizers", MINI)
    half = BaseFiles.open(base, tokenizer=tmp_path / "tokenizers")
    assert (half.patch, half.head_file) == (None, None)
    head = files.write_head(tmp_path / "sdxl" / "fooocus_inpaint_head.pth", MINI)
    whole = BaseFiles.open(base, tokenizer=tmp_path / "tokenizers")
    assert (whole.patch, whole.head_file) == (patch, head) and whole.has_head
    wide = files.write_single_file(tmp_path / "sdxl" / "inpainting.safetensors", MINI, in_channels=9)
    assert BaseFiles.open(wide, tokenizer=tmp_path / "tokenizers").patch is None
    files.write_patch(tmp_path / "sdxl" / "inpaint_v25.fooocus.patch", MINI)
    with pytest.raises(FileFormatError, match=r"several files match \*\.fooocus\.patch"):
        BaseFiles.open(base, tokenizer=tmp_path / "tokenizers")


def test_nine_channels_are_four_and_five_more(single: Path, tmp_path: Path) -> None:
    state = load(single)
    wide = load(files.write_single_file(tmp_path / "inpainting.safetensors", MINI, in_channels=9))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert wide[name].shape == (32, 9, 3, 3)
    assert torch.equal(wide[name][:, :4], state[name])
    assert all(torch.equal(wide[key], state[key]) for key in state if key != name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "fp16", "shards": 2},
        {"format": "bin"},
        {"format": "bin", "variant": "fp16", "shards": 3, "in_channels": 9},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_diffusers_and_transformers_load_every_form(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    files.write_folder(tmp_path, MINI, **options)
    told: dict[str, Any] = {"variant": "fp16"} if "variant" in options else {}
    for name in files.COMPONENTS:
        made, info = model(tmp_path, name, use_safetensors="format" not in options, **told)
        assert not any(info.values()), info
        if name == "vae":
            rtol, atol = (2**-8, 3e-7) if "dtype" in options else (0, 0)
            plain = model(folder, name)[0].state_dict()
            for key, value in made.state_dict().items():
                torch.testing.assert_close(value, plain[key], rtol=rtol, atol=atol)


def test_tokenizers_have_the_encoders_vocabulary(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    files.write_tokenizers(tmp_path, files.sdxl_configs())
    for place, size in ((folder, MINI["text_encoder"]["vocab_size"]), (tmp_path, 49408)):
        for name in files.TOKENIZERS:
            tokenizer = CLIPTokenizer.from_pretrained(place / name)
            assert len(tokenizer) == size
            ids = tokenizer("a photo of a mug, 7!").input_ids
            assert (ids[0], ids[-1]) == (size - 2, size - 1)


def test_networks_are_finite_and_of_order_one(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    peaks = []

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if torch.is_tensor(value):
            peaks.append(float(value.abs().max()))

    def watched(name: str) -> Any:
        made, _ = model(folder, name)
        for part in made.modules():
            part.register_forward_hook(watch)
        return made

    ids = torch.randint(0, 900, (2, 77), generator=generator)
    with torch.inference_mode():
        outputs = [watched(name)(ids, output_hidden_states=True) for name in files.COMPONENTS[2:]]
        text = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        size = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)
        unet = watched("unet")
        latent = torch.randn(2, 4, 16, 16, generator=generator)
        eps = unet(latent, 500, text, added_cond_kwargs={"text_embeds": outputs[1][0], "time_ids": size}).sample
        vae = watched("vae")
        decoded = vae.decode(torch.randn(1, 4, 8, 8, generator=generator) / 0.13025).sample
        moments = vae.encode(decoded).latent_dist
    spreads = [float(value.std()) for value in (text, outputs[1][0], eps, moments.mean, decoded)]
    assert all(0.2 < spread < 5 for spread in spreads), spreads
    assert len(peaks) > 500
    assert max(peaks) < 1000  # float16 ends at 65504; NaN fails too


def test_values_are_random_everywhere() -> None:
    shape = (64, 300)
    first = files.draw(0, "unet", "a.weight", shape)
    assert first.dtype == np.float16
    assert np.array_equal(first, files.draw(0, "unet", "a.weight", shape))
    for other in ((1, "unet", "a.weight"), (0, "vae", "a.weight"), (0, "unet", "b.weight")):
        assert abs(np.corrcoef(first.ravel(), files.draw(*other, shape).ravel())[0, 1]) < 0.05
    assert len(np.unique(first)) > 5000
    assert float(first.std(dtype=np.float64)) == pytest.approx(300**-0.5, rel=0.02)
    full = files.draw(0, "unet", "a.weight", shape, "float32")
    assert np.array_equal(full.astype(np.float16), first)
    bits = files.draw(0, "unet", "a.weight", shape, "bfloat16")
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), torch.from_numpy(full).bfloat16())


@pytest.mark.parametrize("keys", ["v26", "all"])
def test_patch_is_what_torch_saves(keys: str, tmp_path: Path) -> None:
    path = files.write_patch(tmp_path / "mini.fooocus.patch", MINI, keys=keys)
    patch = torch.load(path, weights_only=True)
    shapes, names = files.shapes_of("unet", MINI["unet"]), files.patch_keys(MINI["unet"], keys)
    assert patch.keys() == names.keys()
    assert all(key.startswith("diffusion_model.") for key in patch)
    for key, (codes, low, high) in patch.items():
        shape = shapes[names[key]]
        assert (codes.dtype, tuple(codes.shape)) == (torch.uint8, shape)
        assert {low.dtype, high.dtype} == {torch.float16}
        assert low.shape == high.shape == (shape[0],) + (1,) * (len(shape) - 1)
        assert bool((low < high).all())
    key = max(patch, key=lambda key: patch[key][0].numel())
    codes, low, high = (part.float() for part in patch[key])
    delta = codes / 255 * (high - low) + low
    spread = files.spread_of(names[key], tuple(codes.shape))[1]
    assert float(delta.std()) == pytest.approx(0.01 * spread, rel=0.1)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert (len(patch) == len(shapes)) == (keys == "all")


def test_summary_counts_files_and_folders(folder: Path, single: Path, tmp_path: Path) -> None:
    shapes = [shape for name in files.COMPONENTS for shape in files.shapes_of(name, MINI[name]).values()]
    counted = files.summary(folder)
    assert (counted["tensors"], counted["parameters"]) == (len(shapes), sum(map(math.prod, shapes)))
    one = files.summary(single)
    assert one["bytes"] == single.stat().st_size > 2 * one["parameters"] > 2 * counted["parameters"]
    patch = files.summary(files.write_patch(tmp_path / "mini.fooocus.patch", MINI))
    assert patch["tensors"] == 3 * len(files.patch_keys(MINI["unet"]))


def test_head_is_a_slice_of_nine_channels(tmp_path: Path) -> None:
    head = torch.load(files.write_head(tmp_path / "head.pth", MINI), weights_only=True)["head"]
    assert (head.dtype, tuple(head.shape), head.stride()) == (torch.float16, (32, 5, 3, 3), (81, 9, 3, 1))
    assert head.untyped_storage().nbytes() == 2 * 32 * 81


@pytest.mark.parametrize("dialect", ["reference", "peft", "processor", "kohya", "kohya_sgm"])
def test_diffusers_reads_the_same_lora_in_every_dialect(dialect: str, plain: Any, tmp_path: Path) -> None:
    fused = with_lora(plain, files.write_lora(tmp_path / "lora.safetensors", LITE, dialect=dialect))
    before = plain.state_dict()
    changed = {name: fused[name] - value for name, value in before.items() if not torch.equal(fused[name], value)}
    assert changed.keys() == {
        name for name in before if name.endswith(("to_k.weight", "to_v.weight", "to_out.0.weight"))
    }
    for name, change in changed.items():
        module, shape = name.removesuffix(".weight"), tuple(change.shape)
        down, up = (torch.from_numpy(part).half().float() for part in files._lora_factors(3, "unet", module, shape, 4))
        torch.testing.assert_close(change, up @ down, rtol=1e-3, atol=1e-6)
        assert 0.005 < float(change.norm() / before[name].norm()) < 0.08


@pytest.mark.parametrize("dialect", ["kohya_sgm", "peft"])
def test_diffusers_reads_convolutions_and_feed_forward(dialect: str, plain: Any, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    files.write_lora(path, LITE, dialect=dialect, rank=8, convs=True, feed_forward=True)
    fused, before = with_lora(plain, path), plain.state_dict()
    changed = {name for name in before if not torch.equal(fused[name], before[name])}
    convs = ("conv1", "conv2", "conv_shortcut", "samplers.0.conv", "time_emb_proj")
    linear = ("to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
    assert changed == {name for name in before if name.removesuffix(".weight").endswith(convs + linear)}


def test_sgm_names_of_a_lora_at_full_topology(tmp_path: Path) -> None:
    path = files.write_lora(tmp_path / "lora.safetensors", MINI, dialect="kohya_sgm", convs=True, text_encoders=True)
    keys = load(path).keys()
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in keys
    assert "lora_unet_output_blocks_2_2_conv.lora_up.weight" in keys
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha" in keys
    assert "lora_te2_text_model_encoder_layers_1_self_attn_out_proj.alpha" in keys


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A UNet with one resnet a block: diffusers takes seconds to inject a LoRA into SDXL's number of modules."""
    return model(files.write_folder(tmp_path_factory.mktemp("sdxl") / "lite", LITE), "unet")[0]


def with_lora(plain: Any, path: Path) -> State:
    """The UNet's weights with a LoRA fused into a copy of them by diffusers and peft."""
    from diffusers import StableDiffusionXLPipeline

    unet = copy.deepcopy(plain)
    state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        path, unet_config=unet.config, return_lora_metadata=True
    )
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    unet.fuse_lora()
    unet.unload_lora()
    return dict(unet.state_dict())
