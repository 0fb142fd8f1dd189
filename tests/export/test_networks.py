from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.lora import read_lora  # noqa: E402
from dreammix_trt.core.merging import list_changes, merge_weights  # noqa: E402
from dreammix_trt.core.networks import kv_name  # noqa: E402
from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet  # noqa: E402
from tests.export.conftest import Exported  # noqa: E402


def difference(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(found - truth).max() / np.abs(truth).max())


@pytest.fixture(scope="module")
def recorded(golden: Path) -> TorchEngineSet:
    return TorchEngineSet(BaseFiles.open(golden / "model", golden / "tiny.fooocus.patch", golden / "inpaint_head.pth"))


def steps(golden: Path) -> list[tuple[str, int]]:
    return [
        (case, int(step)) for case in ("case1",) for step in np.load(golden / case / "golden.npz")["unet_output_steps"]
    ]


def unet_inputs(recorded: TorchEngineSet, golden: Path, step: int) -> tuple[str, dict[str, np.ndarray], np.ndarray]:
    """What the UNet of case1 received at a step, and what it returned."""
    run = np.load(golden / "case1/golden.npz")
    stage, patched = ("lcg" if step < 7 else "gch"), bool(run["unet_is_fooocus"][step])
    masked = run[f"vae_latent_{stage}_masked"]
    feature = recorded.run("inpaint_head", mask=run[f"{stage}_latent_mask"].astype(np.float32), masked_latent=masked)[
        "feature"
    ]
    picked = feature[0, run["head_feature_channels"]]
    assert difference(picked, run[f"{stage}_head_feature_ch"]) <= 1e-5
    factors = read_lora(golden / "lora/lora_kohya.safetensors").factors["unet"] if patched else {}
    name = "unet" if patched else "unet_raw"
    weights, own = (
        recorded.weights(each) | merge_weights(recorded.weights(each), list_changes(factors, recorded.slots(each)))
        for each in (kv_name(name), name)
    )
    x = run[f"x_in_step{step:02d}"] / np.sqrt(run["sigmas"][step] ** 2 + 1)
    inputs = {
        "sample": np.repeat(x, 2, 0).astype(np.float32),
        "timestep": np.full(2, run["unet_timesteps"][step], np.float32),
        "text_embeds": run[f"{stage}_unet_pooled"],
        "time_ids": run["time_ids"][step],
        "inpaint_feature": feature * patched,
        **recorded.run(kv_name(name), encoder_hidden_states=run[f"{stage}_unet_text"], **weights),
        **own,
    }
    truth = np.concatenate([run[f"unet_{row}_step{step:02d}"] for row in ("uncond", "cond")])
    return name, inputs, truth


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 7, 9])
def test_torch_reproduces_the_recorded_unet(recorded: TorchEngineSet, golden: Path, step: int) -> None:
    name, inputs, truth = unet_inputs(recorded, golden, step)
    assert difference(recorded.run(name, **inputs)["eps"], truth) <= 1e-4


@pytest.mark.slow
def test_onnx_reproduces_the_recorded_networks(recorded: TorchEngineSet, golden: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxslim")
    from dreammix_trt.export.onnx_export import export_base
    from dreammix_trt.export.parity import OnnxNetwork

    table = export_base(recorded.base, tmp_path, verify=False)
    sessions = {name: OnnxNetwork(tmp_path / name / entry["graph"]) for name, entry in table.items()}
    for step in (0, 9):
        name, inputs, truth = unet_inputs(recorded, golden, step)
        assert difference(sessions[name].run(**inputs)["eps"], truth) <= 1e-4
    run = np.load(golden / "case1/golden.npz")
    decoded = sessions["vae_decoder"].run(latent=run["x0_step06"] / 0.13025)["image"]
    from PIL import Image

    picture = np.asarray(Image.open(golden / "case1/switch_decoded_rgb.png"))
    found = np.round(255 * np.clip(decoded[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1))
    assert np.abs(found - picture).max() <= 1
    image = np.asarray(Image.open(golden / "case1/input.png").convert("RGB"), np.float32).transpose(2, 0, 1)[None]
    mean = sessions["vae_encoder"].run(image=2 * image / 255 - 1)["mean"]
    assert difference(mean, run["vae_mean_gch_background"]) <= 2e-3


def test_the_recorded_prompt_gives_the_recorded_embeddings(recorded: TorchEngineSet, golden: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    run = np.load(golden / "case1/golden.npz")
    hidden, pooled = [], np.zeros(0)
    for encoder, tokens, pad in (("text_encoder", "tokenizer", 49407), ("text_encoder_2", "tokenizer_2", 0)):
        folder = golden / "model" / tokens
        bpe = models.BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
        )
        tokenizer = Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        found = [49406, *tokenizer.encode("a photo of a sks red clay teapot on the table").ids, 49407]
        ids = np.array([found + [pad] * (77 - len(found))])
        outputs = recorded.run(encoder, input_ids=ids)
        hidden.append(outputs["hidden"])
        pooled = outputs.get("pooled", pooled)
    assert difference(np.concatenate(hidden, -1), run["prompt_embeds_raw"]) <= 1e-5
    assert difference(pooled, run["pooled_raw"]) <= 1e-5


@pytest.mark.parametrize("eos", ["legacy", "own"])
@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_text_encoders_are_those_of_transformers(exported: Exported, name: str, eos: str) -> None:
    transformers = pytest.importorskip("transformers")
    from dreammix_trt.core.network_weights import weights_of
    from dreammix_trt.core.networks import describe_networks
    from dreammix_trt.export.torch_module import make_torch_module

    configs = {key: dict(value) for key, value in exported.base.configs.items()}
    vocabulary = configs[name]["vocab_size"]
    configs[name]["eos_token_id"] = 2 if eos == "legacy" else vocabulary - 1
    base = BaseFiles(exported.base.folder, exported.base.patch, exported.base.head_file, False, configs)
    network = next(network for network in describe_networks(base) if network.name == name)
    kind = transformers.CLIPTextModelWithProjection if name.endswith("2") else transformers.CLIPTextModel
    theirs = kind(transformers.CLIPTextConfig(**configs[name])).eval()
    weights = weights_of(base, name)
    spelled = {
        key if key in theirs.state_dict() else key.removeprefix("text_model."): value for key, value in weights.items()
    }
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in spelled.items()})
    ids = torch.randint(3, vocabulary - 2, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[0, 5:], ids[1, 9:] = vocabulary - 1, vocabulary - 1
    if name.endswith("2"):
        ids[0, 6:], ids[1, 10:] = 0, 0
    with torch.inference_mode():
        truth = theirs(ids, output_hidden_states=True)
        found = make_torch_module(network.without_slots(), weights)(ids)
    hidden = found[0] if name.endswith("2") else found
    assert difference(hidden.numpy(), truth.hidden_states[-2].numpy()) <= 1e-5
    if name.endswith("2"):
        assert difference(found[1].numpy(), truth.text_embeds.numpy()) <= 1e-5


def test_networks_are_those_of_diffusers(exported: Exported) -> None:
    """Our attention, feature hook and VAE halves against the plain diffusers modules."""
    base, ours = exported.base, TorchEngineSet(exported.base)
    unet = diffusers.UNet2DConditionModel.from_config(dict(base.configs["unet"])).eval()
    unet.load_state_dict({name: torch.from_numpy(value) for name, value in base.state("unet").items()})
    vae = diffusers.AutoencoderKL.from_config(dict(base.configs["vae"])).eval()
    vae.load_state_dict({name: torch.from_numpy(value) for name, value in base.state("vae").items()})
    networks = {name: ours._networks[name].without_slots() for name in ("unet_raw", "unet_raw_kv")}
    inputs = networks["unet_raw"].draw_example({"pictures": 1, "rows": 2, "h": 8, "w": 12})
    inputs["inpaint_feature"][:] = 0
    told = networks["unet_raw_kv"].draw_example({"rows": 2})
    image = np.tanh(np.random.default_rng(0).standard_normal((1, 3, 64, 96))).astype(np.float32)
    given = ("sample", "timestep", "text_embeds", "time_ids")
    sample, timestep, pooled, time_ids = (torch.from_numpy(inputs[name]) for name in given)
    text = torch.from_numpy(told["encoder_hidden_states"])
    with torch.inference_mode():
        added = {"text_embeds": pooled, "time_ids": time_ids}
        eps = unet(sample, timestep, text, added_cond_kwargs=added).sample.numpy()
        posterior = vae.encode(torch.from_numpy(image)).latent_dist
        decoded = vae.decode(posterior.mean).sample.numpy()
    assert difference(ours.run("unet_raw", **inputs | ours.run("unet_raw_kv", **told))["eps"], eps) <= 1e-5
    moments = ours.run("vae_encoder", image=image)
    assert difference(moments["mean"], posterior.mean.numpy()) <= 1e-5
    assert difference(moments["std"], posterior.std.numpy()) <= 1e-5
    assert difference(ours.run("vae_decoder", latent=moments["mean"])["image"], decoded) <= 1e-5


def test_the_torch_set_answers_like_an_engine_set(exported: Exported) -> None:
    ours = TorchEngineSet(exported.base)
    assert "unet" in ours and "asuka_prior" not in ours
    assert len(ours.slots("unet")) == 66 and len(ours.slots("unet_kv")) == 22 and ours.slots("vae_encoder") == ()
    assert ours.weights("vae_encoder") == {} and len(ours.weights("unet_kv")) == 22
