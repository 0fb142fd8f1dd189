from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.keymap import PREFIX, sgm_to_diffusers
from dreammix_trt.core.lora import Lora, LoraSpec, check_weights, parse_lora, read_lora, weight_changes
from dreammix_trt.core.lora_names import SDXL, flat_modules
from tests.support.tiny_model import random_factors, unet_attention_modules, write_tiny_lora

MODULES = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k": (32, 32),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v": (40, 32),
    "mid_block.attentions.0.transformer_blocks.1.attn1.to_out.0": (32, 32),
}
MICRO = Path(__file__).parents[2] / "dreammix_trt" / "models" / "micro-sdxl" / "unet"
Arrays = dict[str, NDArray[Any]]


@cache
def micro_config() -> dict[str, Any]:
    return dict(json.loads((MICRO / "config.json").read_text()))


@cache
def micro_weights() -> Arrays:
    return {
        name: value.astype(np.float32)
        for name, value in load_file(MICRO / "diffusion_pytorch_model.safetensors").items()
    }


def sgm_names(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers module -> sgm module."""
    table = sgm_to_diffusers(config).items()
    return {name.rsplit(".", 1)[0]: sgm.rsplit(".", 1)[0].removeprefix(PREFIX) for sgm, name in table}


#: a module's name in a dialect, and the ends of its factors' names. m, f: the module by diffusers' name, with dots and
#: flat; s, g: by sgm's; o: in diffusers' old attention processors
DIALECTS = {
    "reference": ("unet.{m}", ".lora.down.weight", ".lora.up.weight"),
    "linear layer": ("unet.{m}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "peft": ("unet.{m}", ".lora_A.weight", ".lora_B.weight"),
    "peft default": ("unet.{m}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft default_0": ("unet.{m}", ".lora_A.default_0.weight", ".lora_B.default_0.weight"),
    "peft, own name": ("unet.{m}", ".lora_A.my-mug v2.weight", ".lora_B.my-mug v2.weight"),
    "peft within the unet": ("unet.base_model.model.{m}", ".lora_A.weight", ".lora_B.weight"),
    "peft around the pipeline": ("base_model.model.unet.{m}", ".lora_A.weight", ".lora_B.weight"),
    "compiled, in parallel": ("unet.module._orig_mod.{m}", ".lora_A.weight", ".lora_B.weight"),
    "old": ("unet.{o}", "_lora.down.weight", "_lora.up.weight"),
    "bare": ("{o}", "_lora.down.weight", "_lora.up.weight"),
    "dotted sgm": (f"{PREFIX}{{s}}", ".lora_down.weight", ".lora_up.weight"),
    "checkpoint": (f"model.{PREFIX}{{s}}", ".lora_A.weight", ".lora_B.weight"),
    "unet sgm": ("unet.{s}", ".lora_A.weight", ".lora_B.weight"),
    "unet flat sgm": ("unet.{g}", ".lora.down.weight", ".lora.up.weight"),
    "kohya": ("lora_unet_{f}", ".lora_down.weight", ".lora_up.weight"),
    "kohya sgm": ("lora_unet_{g}", ".lora_down.weight", ".lora_up.weight"),
    "kohya with dots": ("lora_unet.{m}", ".lora_down.weight", ".lora_up.weight"),
    "kohya omi": ("unet.{s}", ".lora_down.weight", ".lora_up.weight"),
    "kohya lycoris": ("lycoris_{f}", ".lora_down.weight", ".lora_up.weight"),
}  # fmt: skip


def name_in_dialect(
    dialect: str, factors: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], sgm: Mapping[str, str]
) -> Arrays:
    """UNet factors (A, B) under the names that the dialect's trainers write; kohya with alpha = rank / 2."""
    tensors: Arrays = {}
    name, down, up = DIALECTS[dialect]
    for module, (a, b) in factors.items():
        stem, tail = module.removesuffix(".0").rsplit(".", 1)
        old, flat, dotless = f"{stem}.processor.{tail}", module.replace(".", "_"), sgm[module].replace(".", "_")
        place = name.format(m=module, f=flat, s=sgm[module], g=dotless, o=old)
        scale = 2 if dialect.startswith("kohya") else 1
        tensors[f"{place}{down}"] = np.ascontiguousarray(a.T)
        tensors[f"{place}{up}"] = np.ascontiguousarray(b.T * np.float32(scale))
        if scale == 2:
            tensors[f"{place}.alpha"] = np.full((), a.shape[1] / 2, np.float32)
    return tensors


def write_as(path: Path, tensors: Arrays, dtype: str) -> Path:
    """A safetensors file written byte by byte from its definition; bfloat16 is the upper half of float32."""
    header: dict[str, Any] = {}
    data = b""
    for name, value in tensors.items():
        wide = np.ascontiguousarray(value, np.float32)
        numbers = {"F16": wide.astype("<f2"), "F32": wide, "BF16": (wide.view(np.uint32) >> 16).astype("<u2")}[dtype]
        raw = numbers.tobytes()
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def assert_same(lora: Lora, factors: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], tolerance: float) -> None:
    assert lora.factors.keys() == {"unet"} and lora.factors["unet"].keys() == factors.keys()
    for module, pair in factors.items():
        for found, wanted in zip(lora.factors["unet"][module], pair, strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 0.0), ("BF16", 2**-7), ("F16", 2**-10)])
def test_every_dialect_gives_the_same_factors(tmp_path: Path, dialect: str, dtype: str, tolerance: float) -> None:
    config = micro_config()
    factors = random_factors(unet_attention_modules(config), size=3)
    assert len(factors) > 40
    tensors = name_in_dialect(dialect, factors, sgm_names(config))
    path = write_as(
        tmp_path / "x.safetensors",
        {key: 16 * value if "alpha" not in key else value for key, value in tensors.items()},
        dtype,
    )
    lora = read_lora(path, config)
    assert lora.rank == 4 and lora.kernels == {}
    assert_same(lora, {module: (16 * a, 16 * b) for module, (a, b) in factors.items()}, tolerance)


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    names = ("unet.mid_block.x.to_k.lora.down.weight", "unet.mid_block.x.to_k.lora.up.weight")
    tensors = {name: torch.randn(4, 4).to(torch.bfloat16) for name in names}
    save_torch(tensors, tmp_path / "x.safetensors")
    (pair,) = read_lora(tmp_path / "x.safetensors").factors["unet"].values()
    for found, name in zip(pair, names, strict=True):
        assert np.array_equal(found.T, tensors[name].float().numpy())


def test_the_recorded_files_agree_in_every_encoding(golden: Path, tmp_path: Path) -> None:
    config = json.loads((golden / "model/unet/config.json").read_text())
    names = ("pytorch_lora_weights", "lora_peft", "lora_kohya")
    one, two, three = (read_lora(golden / f"lora/{name}.safetensors", config).factors["unet"] for name in names)
    raw = load_file(golden / "lora/pytorch_lora_weights.safetensors")
    assert len(one) == 66 and one.keys() == two.keys() == three.keys()
    for module, (a, b) in one.items():
        up, down = (raw[f"unet.{module}.lora.{side}.weight"] for side in ("up", "down"))
        np.testing.assert_allclose((a @ b).T, up @ down, atol=1e-7)
        for x, y, z in zip((a, b), two[module], three[module], strict=True):
            assert np.array_equal(x, y)
            np.testing.assert_allclose(x, z, rtol=1e-6)
    for dialect in ("old", "kohya sgm", "dotted sgm"):
        save_file(name_in_dialect(dialect, one, sgm_names(config)), tmp_path / "x.safetensors")
        assert_same(read_lora(tmp_path / "x.safetensors", config), one, 0)


def test_without_a_config_flat_names_are_those_of_sdxl(tmp_path: Path) -> None:
    table = flat_modules()
    assert len(set(table.values())) == 1050
    assert table["input_blocks_4_1_transformer_blocks_0_attn1_to_k"] == (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    )
    assert table["output_blocks_2_2_conv"] == "up_blocks.0.upsamplers.0.conv"
    assert table["label_emb_0_0"] == table["add_embedding_linear_1"] == "add_embedding.linear_1"
    assert table["input_blocks_1_0_in_layers_2"] == "down_blocks.0.resnets.0.conv1"
    assert flat_modules(SDXL) == table != flat_modules(micro_config())
    name = "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj.lora_"
    save_file(
        {f"{name}down.weight": np.ones((2, 8), "f"), f"{name}up.weight": np.ones((8, 2), "f")},
        tmp_path / "x.safetensors",
    )
    assert list(read_lora(tmp_path / "x.safetensors").factors["unet"]) == [
        "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"
    ]
    with pytest.raises(
        FileFormatError, match=r"2 names are not understood.*lora_unet_middle_block_1_transformer_blocks_9"
    ):
        read_lora(tmp_path / "x.safetensors", micro_config())


ATTENTION = "text_model.encoder.layers.0.self_attn"


@pytest.mark.parametrize(
    ("name", "network", "module"),
    [
        (f"text_encoder.{ATTENTION}.q_proj.lora.", "text_encoder", f"{ATTENTION}.q_proj"),
        (f"text_encoder.{ATTENTION}.to_k_lora.", "text_encoder", f"{ATTENTION}.k_proj"),
        (f"text_encoder.{ATTENTION}.to_out_lora.", "text_encoder", f"{ATTENTION}.out_proj"),
        ("text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer.", "text_encoder", f"{ATTENTION}.q_proj"),
        (f"text_encoder_2.{ATTENTION}.out_proj.lora_linear_layer.", "text_encoder_2", f"{ATTENTION}.out_proj"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_", "text_encoder", f"{ATTENTION}.q_proj"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_k_proj.lora_", "text_encoder", f"{ATTENTION}.k_proj"),
        ("lora_te2_text_model_encoder_layers_9_mlp_fc1.lora_", "text_encoder_2", "text_model.encoder.layers.9.mlp.fc1"),
        ("lora_te2_text_projection.lora_", "text_encoder_2", "text_projection"),
        (f"text_encoders.clip_l.transformer.{ATTENTION}.q_proj.lora_", "text_encoder", f"{ATTENTION}.q_proj"),
        (f"text_encoders.clip_g.transformer.{ATTENTION}.v_proj.lora_", "text_encoder_2", f"{ATTENTION}.v_proj"),
        (f"text_encoders.clip_l.{ATTENTION}.out_proj.lora_", "text_encoder", f"{ATTENTION}.out_proj"),
        ("clip_g.transformer.text_projection.lora_", "text_encoder_2", "text_projection"),
        (f"clip_g.{ATTENTION}.k_proj.lora_", "text_encoder_2", f"{ATTENTION}.k_proj"),
        (f"lora_te1.{ATTENTION}.k_proj.lora_", "text_encoder", f"{ATTENTION}.k_proj"),
        (f"text_encoder_2.base_model.model.{ATTENTION}.k_proj.lora_", "text_encoder_2", f"{ATTENTION}.k_proj"),
    ],
)
def test_text_encoder_parts(tmp_path: Path, name: str, network: str, module: str) -> None:
    tensors = {f"{name}down.weight": np.ones((2, 8), np.float32), f"{name}up.weight": np.ones((8, 2), np.float16)}
    save_file(tensors, tmp_path / "x.safetensors")
    (pair,) = read_lora(tmp_path / "x.safetensors").factors[network].items()
    assert pair[0] == module
    assert pair[1][0].shape == (8, 2) and pair[1][1].dtype == np.float32


def test_folders_as_training_leaves_them(tmp_path: Path) -> None:
    for step in (250, 1000, 500):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        write_tiny_lora(folder / "pytorch_lora_weights.safetensors", random_factors(MODULES))
    (tmp_path / "checkpoint-2000").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert read_lora(tmp_path).source_path.parent.name == "checkpoint-1000"
    assert read_lora(tmp_path / "checkpoint-500").source_path.parent.name == "checkpoint-500"
    write_tiny_lora(tmp_path / "pytorch_lora_weights_kohya.safetensors", random_factors(MODULES), dialect="kohya")
    write_tiny_lora(tmp_path / "pytorch_lora_weights.safetensors", random_factors(MODULES))
    assert read_lora(tmp_path).source_path == tmp_path / "pytorch_lora_weights.safetensors"
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "mine.safetensors")
    with pytest.raises(FileFormatError, match="2 others; name the LoRA file"):
        read_lora(tmp_path)


K, V, OUT = MODULES


@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({"unet.r": 4, "unet.lora_alpha": 8}, {K: 2, V: 2, OUT: 2}),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, {K: 4, V: 4, OUT: 4}),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_v": 12, OUT: 2}}, {K: 1, V: 3, OUT: 0.5}),
        ({"unet.alpha_pattern": {"attn1.to_k": 8, "to_k": 1}}, {K: 2, V: 1, OUT: 1}),
    ],
)
def test_adapter_metadata_gives_the_scale(tmp_path: Path, fields: dict[str, Any], scales: dict[str, float]) -> None:
    factors = random_factors(MODULES)
    tensors = load_file(write_tiny_lora(tmp_path / "x.safetensors", factors, dialect="peft"))
    if "to_k" in fields.get("unet.alpha_pattern", {}):
        module = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_"
        tensors |= {f"{module}A.weight": np.ones((4, 8), "f"), f"{module}B.weight": np.ones((8, 4), "f")}
    save_file(tensors, tmp_path / "y.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
    found = read_lora(tmp_path / "y.safetensors").factors["unet"]
    for module, scale in scales.items():
        np.testing.assert_allclose(found[module][1], scale * factors[module][1], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "not what PEFT writes"),
        ("{", "not what PEFT writes"),
        ('{"unet.lora_alpha": "x"}', "not what PEFT writes"),
        (f'{{"unet.lora_alpha": 1{"0" * 400}}}', "not what PEFT writes"),
        ('{"unet.use_dora": true}', "DoRA"),
        ('{"unet.alpha_pattern": {"to_(": 3}}', "not what PEFT writes"),
        ('{"unet.lora_alpha": Infinity}', "not a usable scale"),
    ],
)
def test_damaged_adapter_metadata_is_named(tmp_path: Path, text: str, message: str) -> None:
    tensors = load_file(write_tiny_lora(tmp_path / "x.safetensors", random_factors(MODULES), dialect="peft"))
    save_file(tensors, tmp_path / "y.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(FileFormatError, match=message):
        read_lora(tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_unet_mid.hada_w1_a", (4, 4), "a LoHa file of LyCORIS .*train with LyCORIS' algo=lora"),
        ("lycoris_mid.lokr_w1", (4, 4), "LoKr"),
        ("bundle_emb.ohwx.clip_l", (4, 768), "OneTrainer with textual inversion.*bundle additional embeddings"),
        ("clip_g", (4, 1280), "a textual inversion embedding"),
        ("lora_unet_mid.dora_scale", (4, 4), "DoRA"),
        ("unet.mid.to_k.lora_magnitude_vector.weight", (4,), "DoRA"),
        ("lora_unet_mid.oft_blocks", (4, 4), "OFT"),
        ("lora_unet_mid.a1.weight", (4, 4), "GLoRA"),
        ("lora_unet_mid.diff_b", (4,), "full-difference"),
        ("lora_unet_mid.on_input", (4,), r"\(IA\)3"),
        ("unet.mid.to_k.lora_B.bias", (4,), "LoRA-with-biases"),
        ("something.weight", (4,), "not understood.*something.weight"),
        ("model.diffusion_model.out.2.weight", (4,), "not understood.*out.2.weight"),
        ("unet.mid.to_k.lora.down.weight", (4, 8), "no 'up' factor"),
        ("unet.mid.to_k.alpha", (), "no 'down' factor"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    save_file({name: np.ones(shape, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match=message):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lora_down": (4, 8), "lora_up": (8, 3)}, r"\(4, 8\) and \(8, 3\), which do not multiply"),
        ({"lora_down": (4, 8, 3, 3), "lora_up": (8, 4, 3, 3)}, "which do not multiply"),
        ({"lora_down": (4, 8, 3), "lora_up": (8, 4)}, "which do not multiply"),
        ({"lora_down": (0, 8), "lora_up": (8, 0)}, "which do not multiply"),
        ({"lora_down": (4, 8), "lora_mid": (4, 4, 3, 3), "lora_up": (8, 4)}, "core of shape"),
        ({"lora_down": (4, 8, 1, 1), "lora_mid": (4, 5, 3, 3), "lora_up": (8, 4)}, "core of shape"),
    ],
)
def test_factors_that_do_not_multiply(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    tensors = {f"lora_unet_conv_in.{name}.weight": np.ones(shape, "f") for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match=f"unet.conv_in .*{message}"):
        read_lora(tmp_path / "x.safetensors")


def test_one_module_in_two_spellings_is_refused(tmp_path: Path) -> None:
    factors = random_factors({K: (32, 32)})
    tensors = name_in_dialect("kohya", factors, sgm_names(SDXL)) | name_in_dialect(
        "kohya sgm", factors, sgm_names(SDXL)
    )
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match=r"3 factors appear twice.*input_blocks_4_1"):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        (
            {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768)},
            r"Stable Diffusion 1\.x$",
        ),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320)}, r"Stable Diffusion 1\.x or 2\.x$"),
        ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v": (320, 1024)}, r"Diffusion 2\.x$"),
        ({"lora_unet_input_blocks_10_1_transformer_blocks_3_attn2_to_k": (1536, 1280)}, "the SDXL refiner$"),
        ({"lora_unet_double_blocks_0_img_attn_proj": (3072, 3072)}, "Flux$"),
        ({"transformer.transformer_blocks.0.attn.to_k": (64, 64)}, "Stable Diffusion 3 or Flux$"),
        ({"lora_unet_what_is_this": (8, 8)}, "lora_unet_what_is_this.lora_up.weight$"),
    ],
)
def test_loras_of_other_models_are_recognised(tmp_path: Path, tensors: dict[str, tuple[int, int]], family: str) -> None:
    files = {}
    for name, (out, inputs) in tensors.items():
        files[f"{name}.lora_down.weight"] = np.ones((4, inputs), np.float32)
        files[f"{name}.lora_up.weight"] = np.ones((out, 4), np.float32)
    save_file(files, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match=f"not understood.*{family}"):
        read_lora(tmp_path / "x.safetensors")


def test_damaged_files_say_so(tmp_path: Path) -> None:
    path = write_tiny_lora(tmp_path / "x.safetensors", random_factors(MODULES))
    whole = path.read_bytes()
    for length in (0, 7, 300, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="truncated"):
            read_lora(path)
    save_file({}, path)
    with pytest.raises(FileFormatError, match="holds no tensors"):
        read_lora(path)
    save_file({f"unet.{K}.lora.down.weight": np.ones((2, 2), np.uint8)}, path)
    with pytest.raises(FileFormatError, match="of type uint8; save it as fp16"):
        read_lora(path)
    with pytest.raises(FileFormatError, match="no such LoRA"):
        read_lora(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="holds no pytorch_lora_weights"):
        read_lora(tmp_path / "empty")
    for value in (np.nan, np.inf):
        broken = random_factors(MODULES)
        broken[K][1][0, 0] = value
        with pytest.raises(FileFormatError, match=r"attn1\.to_k holds values that are not finite"):
            read_lora(write_tiny_lora(tmp_path / "nan.safetensors", broken))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a.safetensors", LoraSpec(Path("a.safetensors"))),
        ("a.safetensors:0.5", LoraSpec(Path("a.safetensors"), 0.5)),
        ("a.safetensors:-1e-1:raw", LoraSpec(Path("a.safetensors"), -0.1, "raw")),
        (r"C:\x\a.safetensors", LoraSpec(Path(r"C:\x\a.safetensors"))),
        (r"C:\x\a.safetensors:1:both", LoraSpec(Path(r"C:\x\a.safetensors"), 1.0, "both")),
        ("C:/x", LoraSpec(Path("C:/x"))),
        ("out:3/b.safetensors:2", LoraSpec(Path("out:3/b.safetensors"), 2.0)),
        ("run:2:last.safetensors", LoraSpec(Path("run:2:last.safetensors"))),
        ("folder:2:patched", LoraSpec(Path("folder"), 2.0, "patched")),
    ],
)
def test_loras_as_a_user_writes_them(text: str, spec: LoraSpec) -> None:
    assert parse_lora(text) == spec


def test_the_default_target_is_the_callers() -> None:
    assert parse_lora("a:1", "both").target == "both" and parse_lora("a:1:raw", "both").target == "raw"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:1:fooocus", "unknown target 'fooocus'; allowed: patched, raw, both"),
        ("a:1:", "unknown target ''"),
        ("a:nan", "scale is nan"),
        ("a:inf:raw", "scale is inf"),
        ("a:raw", "no scale in 'raw'; give FILE"),
        ("a.safetensors:0,8", "no scale in '0,8'"),
        ("a.safetensors:0,8:raw", "no scale in '0,8:raw'"),
        (":1", "names no file"),
        ("", "names no file"),
    ],
)
def test_loras_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_lora(text)


def draw_factors(weights: Mapping[str, NDArray[Any]], rank: int = 3) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """module -> (down, up) for every linear and convolution of the weights."""
    rng = np.random.default_rng(5)
    return {
        name.removesuffix(".weight"): (
            rng.normal(0, 0.1, (rank, *weight.shape[1:])).astype(np.float32),
            rng.normal(0, 0.1, (weight.shape[0], rank) + (1,) * (weight.ndim - 2)).astype(np.float32),
        )
        for name, weight in weights.items()
        if weight.ndim > 1
    }


def write_kohya(
    path: Path, pairs: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], named: Callable[[str], str]
) -> Path:
    tensors: Arrays = {}
    for module, (down, up) in pairs.items():
        name = f"lora_unet_{named(module).replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = np.full((), 1.5, np.float32)
    save_file(tensors, path)
    return path


def product(down: NDArray[Any], up: NDArray[Any]) -> NDArray[np.float64]:
    """The weight of `up` after `down`, by definition: every rank's outer product."""
    flat = up.reshape(up.shape[:2]).astype(np.float64)
    found: NDArray[np.float64] = np.einsum("or,r...->o...", flat, down.astype(np.float64))
    return found


@pytest.mark.parametrize("naming", ["diffusers", "sgm"])
def test_merging_is_the_formula(tmp_path: Path, naming: str) -> None:
    weights, sgm = micro_weights(), sgm_names(micro_config())
    pairs = draw_factors(weights)
    path = write_kohya(tmp_path / "x.safetensors", pairs, lambda module: sgm[module] if naming == "sgm" else module)
    lora = read_lora(path, micro_config())
    check_weights(lora, "unet_raw", {name: weight.shape for name, weight in weights.items()})
    changes = weight_changes(lora, "unet", 0.7)
    assert changes.keys() == {name for name, weight in weights.items() if weight.ndim > 1}
    assert (
        weight_changes(lora, "unet_raw", 1).keys() == changes.keys() and weight_changes(lora, "text_encoder", 1) == {}
    )
    for name, change in changes.items():
        before = weights[name].copy()
        found = change(weights[name])
        assert np.array_equal(weights[name], before)
        assert found.dtype == np.float32 and found.flags.c_contiguous and found.shape == before.shape
        wanted = before + 0.7 * 1.5 / 3 * product(*pairs[name.removesuffix(".weight")])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_core_is_multiplied_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    down, mid, up = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 1, 1), (3, 2, 3, 3), (5, 3, 1, 1))
    )
    parts = {
        f"lora_unet_conv_in.lora_{side}.weight": value
        for side, value in zip(("down", "mid", "up"), (down, mid, up), strict=True)
    }
    save_file(parts, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    assert lora.kernels == {"unet.conv_in": (3, 3)} and lora.rank == 3
    wanted = np.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    change = weight_changes(lora, "unet", 1)["conv_in.weight"]
    np.testing.assert_allclose(change(np.zeros((5, 4, 3, 3), np.float32)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("naming", ["diffusers", "sgm"])
def test_merging_agrees_with_diffusers(tmp_path: Path, naming: str) -> None:
    """diffusers reads the same kohya file, by its own name tables, and fuses it through PEFT."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    weights, sgm = micro_weights(), sgm_names(micro_config())
    pairs = draw_factors(weights)
    if naming == "diffusers":  # diffusers' table garbles one of these names, "add.embedding.linear"
        pairs = {module: pair for module, pair in pairs.items() if not module.startswith("add_embedding")}
    path = write_kohya(tmp_path / "x.safetensors", pairs, lambda module: sgm[module] if naming == "sgm" else module)
    unet = diffusers.UNet2DConditionModel.from_config(micro_config())
    unet.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    state, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(str(path), unet_config=unet.config)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    unet.fuse_lora(lora_scale=0.7)
    unet.unload_lora()
    changes = weight_changes(read_lora(path, micro_config()), "unet", 0.7)
    assert len(changes) == len(pairs) > 60
    for name, change in changes.items():
        np.testing.assert_allclose(change(weights[name]), unet.state_dict()[name].numpy(), rtol=1e-5, atol=1e-6)


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_"
    tensors = {f"{name}down.weight": np.ones((2, 768), "f"), f"{name}up.weight": np.ones((64, 2), "f")}
    save_file(tensors, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    ((weight, change),) = weight_changes(lora, "unet", 1).items()
    with pytest.raises(
        FileFormatError, match=r"attn2\.to_k changes a weight of shape \(64, 768\), the base's is \(64, 2048\)"
    ):
        change(np.zeros((64, 2048), np.float32))
    for shapes, message in (
        (
            {weight: (64, 2048)},
            r"another base \(Stable Diffusion 1\.x\); 1 modules of unet.*\(64, 768\), here \(64, 2048\)",
        ),
        ({"conv_in.weight": (64, 4, 3, 3)}, r"to_k \(64, 768\), which the base lacks"),
    ):
        with pytest.raises(FileFormatError, match=message):
            check_weights(lora, "unet", shapes)


def test_a_1x1_convolution_fits_a_linear_layer_and_the_reverse(tmp_path: Path) -> None:
    for trailing, weight in (((1, 1), (6, 4)), ((), (6, 4, 1, 1))):
        tensors = {
            "lora_unet_conv_in.lora_down.weight": np.ones((2, 4, *trailing), np.float32),
            "lora_unet_conv_in.lora_up.weight": np.ones((6, 2, *trailing), np.float32),
        }
        save_file(tensors, tmp_path / "x.safetensors")
        change = weight_changes(read_lora(tmp_path / "x.safetensors"), "unet", 1)["conv_in.weight"]
        assert np.array_equal(change(np.zeros(weight, np.float32)), np.full(weight, 2, np.float32))


def write_peft(folder: Path, config: Any, prefix: str = "base_model.model.") -> dict[str, tuple[Any, Any]]:
    """A folder as PEFT's save_pretrained leaves it, with the factors of `MODULES`."""
    folder.mkdir(exist_ok=True)
    factors = random_factors(MODULES)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{prefix}{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return factors


PATTERNS: list[dict[str, float]] = [
    {"to_[kv]": 8, "to_out.0": 2},
    {r"down_blocks\.\d+\..*": 2, ".*attn1.*": 8},
    {"mid_block.*to_out.0": 2, "out.0": 8, "attn.": 16},
    {"k|to_v": 8},
    {K: 2, "to_k": 8},
    {"o_k": 2, ".*": 8},
    {"nowhere": 2},
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_patterns_are_regular_expressions_as_peft_reads_them(
    tmp_path: Path, patterns: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    factors = write_peft(tmp_path / "peft", {"r": 4, "lora_alpha": 4, "alpha_pattern": patterns})
    ranks = {pattern: 4 for pattern in patterns}
    metadata = {f"unet.{key}": value for key, value in (("lora_alpha", 4), ("alpha_pattern", patterns))}
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    for given in (tmp_path / "peft", tmp_path / "x.safetensors"):
        found = read_lora(given).factors["unet"]
        for module, (_, b) in factors.items():
            alpha = patterns.get(get_pattern_key(patterns.keys(), module), 4)
            np.testing.assert_allclose(found[module][1], b * np.float32(alpha / 4), rtol=1e-6)
    assert ("alphas for modules that the file lacks: nowhere" in caplog.text) == ("nowhere" in patterns)
    write_peft(tmp_path / "ranks", {"r": 9, "lora_alpha": 4, "rank_pattern": ranks})
    if any(get_pattern_key(ranks, module) == module and module not in ranks for module in factors):
        with pytest.raises(FileFormatError, match=r"has rank 4, but .* says 9"):
            read_lora(tmp_path / "ranks")
    else:
        assert read_lora(tmp_path / "ranks").rank == 4


@pytest.mark.parametrize("prefix", ["base_model.model.", "unet."])
@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"r": 4, "lora_alpha": 8}, {K: 2, V: 2, OUT: 2}),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, {K: 4, V: 4, OUT: 4}),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_v": 12, OUT: 2}}, {K: 1, V: 3, OUT: 0.5}),
        ({"r": 9, "lora_alpha": 4, "rank_pattern": {"to_v": 4, "to_k": 4, "to_out.0": 4}}, {K: 1, V: 1, OUT: 1}),
    ],
)
def test_a_peft_folder_gives_its_scale(tmp_path: Path, prefix: str, config: Any, scales: dict[str, float]) -> None:
    factors = write_peft(tmp_path / "peft", {"peft_type": "LORA", **config}, prefix)
    for given in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        lora = read_lora(given)
        assert lora.factors.keys() == {"unet"}
        for module, scale in scales.items():
            np.testing.assert_allclose(lora.factors["unet"][module][1], scale * factors[module][1], rtol=1e-6)
            assert np.array_equal(lora.factors["unet"][module][0], factors[module][0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8, "lora_alpha": 8}, r"has rank 4, but adapter_config\.json beside it says 8; the files do not belong"),
        ({"r": 4, "lora_alpha": 0}, "alpha 0 .lora_alpha, or .alpha., which turns it off"),
        ({"r": 4, "lora_alpha": "x"}, r"adapter_config\.json beside it is not what PEFT writes"),
        ({"r": 4, "rank_pattern": [1]}, r"adapter_config\.json beside it is not what PEFT writes"),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_(": 2}}, "is not what PEFT writes"),
        ({"r": 4, "lora_alpha": 4, "rank_pattern": {"*": 2}}, "is not what PEFT writes"),
        ({"r": 4, "lora_alpha": 4, "use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA", "r": 4}, "peft_type is 'LOHA'"),
        ({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ([], "a JSON list, not an object"),
    ],
)
def test_peft_configs_that_cannot_be_used(tmp_path: Path, config: Any, message: str) -> None:
    write_peft(tmp_path, config)
    with pytest.raises(FileFormatError, match=message):
        read_lora(tmp_path)


def test_a_text_encoder_of_peft_is_told_by_its_names(tmp_path: Path) -> None:
    for prefix in ("text_model.", ""):
        name = f"base_model.model.{prefix}encoder.layers.1.self_attn.q_proj.lora_"
        tensors = {f"{name}A.weight": np.ones((2, 8), "f"), f"{name}B.weight": np.ones((8, 2), "f")}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        assert list(read_lora(tmp_path).factors["text_encoder"]) == ["text_model.encoder.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("fields", [{"unet.lora_alpha": 0}, {"unet.alpha_pattern": {"to_k": 0}}])
def test_an_alpha_of_zero_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    tensors = load_file(write_tiny_lora(tmp_path / "x.safetensors", random_factors(MODULES), dialect="peft"))
    save_file(tensors, tmp_path / "y.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
    with pytest.raises(FileFormatError, match=r"attn1\.to_k has alpha 0"):
        read_lora(tmp_path / "y.safetensors")


def test_peft_itself_means_the_same(tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    inner = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, 8, 3), "conv_out": torch.nn.Conv2d(8, 4, 3)})
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["conv_in", "conv_out"],
        init_lora_weights=False,
        alpha_pattern={"conv_in": 1.5},
        rank_pattern={"conv_in": 2},
    )
    model = peft.get_peft_model(inner, config)
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path)
    for name in ("conv_in", "conv_out"):
        layer = model.base_model.model[name]
        a, b = lora.factors["unet"][name]
        wanted = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose((a @ b).T.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-7)


def test_a_lora_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_lora(tmp_path / "x.safetensors", random_factors(MODULES))

    def refused(self: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(FileFormatError, match=r"x\.safetensors: cannot be read \(Permission denied\)"):
        read_lora(path)


# Files as other tools write them


def write_with_metadata(path: Path, tensors: Arrays, metadata: Any) -> Path:
    """A safetensors file whose metadata is any JSON."""
    save_file(tensors, path)
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:size]) | {"__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[size:])
    return path


def test_metadata_of_numbers_and_lists_is_read(tmp_path: Path) -> None:
    factors = random_factors(MODULES)
    told = {"ss_network_dim": 4, "ss_steps": 1.5, "ss_tags": {"a": 1}, "none": None, "format": "pt"}
    path = write_with_metadata(tmp_path / "x.safetensors", name_in_dialect("kohya sgm", factors, sgm_names(SDXL)), told)
    lora = read_lora(path)
    assert_same(lora, factors, 1e-6)
    assert lora.metadata == {
        "ss_network_dim": "4", "ss_steps": "1.5", "ss_tags": '{"a": 1}', "none": "null", "format": "pt"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "adapter_model.bin", "mug.pt"])
@pytest.mark.parametrize("nested", [False, True])
def test_files_of_torch_are_read_without_running_them(tmp_path: Path, name: str, nested: bool) -> None:
    torch = pytest.importorskip("torch")
    factors = random_factors(MODULES)
    held = {key: torch.from_numpy(value) for key, value in name_in_dialect("kohya", factors, sgm_names(SDXL)).items()}
    torch.save({"state_dict": held} if nested else held, tmp_path / name)
    assert_same(read_lora(tmp_path / name), factors, 1e-6)
    if name != "mug.pt":
        assert read_lora(tmp_path).source_path.name == name


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, ("hostile",)


def test_a_hostile_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"lora_unet_conv_in.lora_down.weight": Hostile()}, tmp_path / "x.bin")
    with pytest.raises(FileFormatError, match=r"x\.bin.*which a dict of tensors never does; it is not read"):
        read_lora(tmp_path / "x.bin")
    assert not (tmp_path / "hostile").exists()


def test_several_adapters_in_one_file_are_named(tmp_path: Path) -> None:
    factors = random_factors(MODULES)
    tensors = name_in_dialect("peft default", factors, sgm_names(SDXL))
    more = {key.replace(".default.", ".mug."): value for key, value in tensors.items()}
    save_file(tensors | more, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match=r"holds 2 adapters of PEFT \(default, mug\); save each"):
        read_lora(tmp_path / "x.safetensors")


def test_adapters_on_different_layers_are_one_lora(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    factors, sgm = random_factors(MODULES), sgm_names(SDXL)
    one, *others = ({module: pair} for module, pair in factors.items())
    tensors = name_in_dialect("peft default", one, sgm)
    for other in others:
        tensors |= name_in_dialect("peft default_0", other, sgm)
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same(read_lora(tmp_path / "x.safetensors"), factors, 0)
    assert "adapters default, default_0 are on different layers and count as one LoRA" in caplog.text


def test_a_file_of_nothing_that_sdxl_has_is_refused(tmp_path: Path) -> None:
    name = "lora_te1_text_projection.lora_"
    save_file({f"{name}down.weight": np.ones((4, 8), "f"), f"{name}up.weight": np.ones((8, 4), "f")}, tmp_path / "x.pt")
    with pytest.raises(FileFormatError, match="holds nothing that SDXL has: lora_te1_text_projection"):
        read_lora(tmp_path / "x.pt")


def test_folders_of_named_adapters(tmp_path: Path) -> None:
    write_peft(tmp_path / "mug", {"r": 4, "lora_alpha": 8})
    assert read_lora(tmp_path).source_path == tmp_path / "mug" / "adapter_model.safetensors"
    write_peft(tmp_path / "cup", {"r": 4, "lora_alpha": 8})
    with pytest.raises(FileFormatError, match=r"holds 2 adapters of PEFT .cup, mug.; name the folder of one"):
        read_lora(tmp_path)


def test_a_lora_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--mug" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_tiny_lora(snapshot / "pytorch_lora_weights.safetensors", random_factors(MODULES))
    assert read_lora(tmp_path / "models--me--mug").source_path.parent == snapshot


def test_the_projection_that_sdxl_lacks_is_said_to_be_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    factors = random_factors(MODULES)
    tensors = name_in_dialect("kohya", factors, sgm_names(SDXL))
    for side, shape in (("down", (4, 768)), ("up", (768, 4))):
        tensors[f"lora_te1_text_projection.lora_{side}.weight"] = np.ones(shape, np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same(read_lora(tmp_path / "x.safetensors"), factors, 1e-6)
    assert "lora_te1_text_projection.lora_down.weight" in caplog.text and "are not used" in caplog.text


def test_models_given_as_loras_are_named(tmp_path: Path) -> None:
    heads = ("model.diffusion_model.x", "conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x")
    for names, told in (
        (heads, "a whole SDXL checkpoint, give it as the base"),
        (("model.diffusion_model.out.2.weight",), "a UNet without text encoders"),
        (("first_stage_model.encoder.conv_in.weight",), "a VAE"),
    ):
        save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "x.safetensors")
        with pytest.raises(FileFormatError, match=f"not understood.*this is {told}"):
            read_lora(tmp_path / "x.safetensors")
