"""Public weights in their own formats: read under our names, and refused by name where they do not fit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import torch

from dreammix_trt.core.asuka import DecoderConfig, PriorConfig
from dreammix_trt.core.asuka_public import check_start, read_alignment, read_autoencoder, read_decoder
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.keymap import vae_to_diffusers
from dreammix_trt.core.tensors import Weights
from dreammix_trt.core.torch_modules.asuka_decoder import AsukaDecoder
from dreammix_trt.core.torch_modules.asuka_prior import Alignment
from dreammix_trt.core.torch_modules.masked_autoencoder import MaskedAutoencoder

PRIOR = PriorConfig(
    **{"side": 16, "patch": 4, "width": 24, "layers": 2, "heads": 3, "decoder_width": 16, "decoder_layers": 3},
    **{"decoder_heads": 2, "feature_layer": 2, "align_width": 24, "align_layers": 2, "align_head": 8},
    **{"context_width": 24, "pooled_width": 12},
)
DECODER = DecoderConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, use_post_quant_conv=False)
POSITIONS = ("pos_embed", "decoder_pos_embed")
State = dict[str, Any]


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def assert_same(found: Weights, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), value)


@pytest.mark.parametrize("beside", [{}, {"epoch": 300, "args": argparse.Namespace(lr=1e-4, name="mae")}])
def test_the_authors_autoencoder(tmp_path: Path, beside: dict[str, Any]) -> None:
    """As `save_model` of MAE writes it, with the options of the training or without; nothing of these is run."""
    module = MaskedAutoencoder(PRIOR)
    state = module.state_dict()
    torch.save({"model": state, **beside}, tmp_path / "mae_300.pth")
    found = read_autoencoder(tmp_path / "mae_300.pth")
    assert_same(found, {name: value for name, value in state.items() if name not in POSITIONS})
    assert check_start("file", found, shapes_of(module)) == POSITIONS


def test_the_original_autoencoder_lacks_what_asuka_added(tmp_path: Path) -> None:
    module = MaskedAutoencoder(PRIOR)
    added = ("alpha", "decoder_patch_embed.proj.weight", "decoder_patch_embed.proj.bias")
    state = {name: value for name, value in module.state_dict().items() if name not in added}
    state |= {"cls_token": torch.zeros(1, 1, 24), "pos_embed": torch.zeros(1, 17, 24)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    missing = check_start("file", read_autoencoder(tmp_path / "mae.pth"), shapes_of(module))
    assert {*missing} == {*added, *POSITIONS}


@pytest.fixture(scope="module")
def vit() -> Any:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    config = ViTMAEConfig(
        **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96},
        **{"image_size": 16, "patch_size": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 3},
        **{"decoder_num_attention_heads": 2, "decoder_intermediate_size": 64, "layer_norm_eps": 1e-6},
    )
    return ViTMAEForPreTraining(config).eval()


@pytest.mark.parametrize("names", ["saved", "in memory"])
def test_transformers_autoencoder(vit: Any, names: str, tmp_path: Path) -> None:
    """Its blocks and projections compute the same in our module; its class token and positions stay behind."""
    if names == "saved":
        vit.save_pretrained(tmp_path)
    else:
        torch.save(vit.state_dict(), tmp_path / "pytorch_model.bin")
    module = MaskedAutoencoder(PRIOR).eval()
    found = read_autoencoder(tmp_path)
    missing = check_start(tmp_path, found, shapes_of(module))
    assert {*missing} == {*POSITIONS, "alpha", "decoder_patch_embed.proj.weight", "decoder_patch_embed.proj.bias"}
    module.load_state_dict({name: torch.from_numpy(found[name]) for name in found}, strict=False)
    with torch.no_grad():
        x, y = torch.randn(2, 5, 24), torch.randn(2, 16, 16)
        for ours, theirs in zip(module.blocks, vit.vit.layers, strict=True):
            torch.testing.assert_close(ours(x), _first(theirs(x)), rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(module.decoder_blocks, vit.decoder.decoder_layers, strict=True):
            torch.testing.assert_close(ours(y), _first(theirs(y)), rtol=1e-5, atol=1e-5)
        picture = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(module._join_patches(vit.patchify(picture)), picture)


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def test_the_names_that_the_hub_has(vit: Any, tmp_path: Path) -> None:
    """facebook/vit-mae-base was saved by an older version, which calls the decoder's blocks `decoder_layers`."""
    names = {
        **{
            f"attention.{new}_proj": f"attention.attention.{old}"
            for new, old in (("q", "query"), ("k", "key"), ("v", "value"))
        },
        **{"attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
    }
    old = {}
    for name, value in vit.state_dict().items():
        renamed = name.replace("vit.layers.", "vit.encoder.layer.")
        for new, classic in names.items():
            renamed = renamed.replace(f".{new}.", f".{classic}.")
        old[renamed] = value
    assert "decoder.decoder_layers.2.attention.attention.value.bias" in old
    torch.save(old, tmp_path / "pytorch_model.bin")
    torch.save(vit.state_dict(), tmp_path / "new.bin")
    found, wanted = read_autoencoder(tmp_path), read_autoencoder(tmp_path / "new.bin")
    assert_same(found, {name: torch.from_numpy(wanted[name]) for name in wanted})


def write_alignment(file: Path, module: Alignment) -> State:
    """As `nn.Sequential(Linear, 2 blocks, LayerNorm)` of the authors is saved, with their unused modulation."""
    state = {name: value for name, value in module.state_dict().items() if not name.startswith("pooled.")}
    theirs = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        theirs[{"embed": f"0.{rest}", "norm": f"3.{rest}"}.get(head) or f"{int(number) + 1}.{part}"] = value
    theirs["1.modulation.lin.weight"] = torch.zeros(72, 24)
    torch.save(theirs, file)
    return state


def test_the_authors_alignment(tmp_path: Path) -> None:
    module = Alignment(PRIOR)
    state = write_alignment(tmp_path / "asuka_alignment_t5.pt", module)
    found = read_alignment(tmp_path / "asuka_alignment_t5.pt")
    assert_same(found, state)
    assert check_start("file", found, shapes_of(module)) == ("pooled.weight", "pooled.bias")


def test_an_alignment_of_another_width_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "asuka_alignment_clip.pt"
    write_alignment(file, Alignment(PRIOR))
    other = Alignment(PriorConfig(**{**vars(PRIOR), "align_width": 48, "context_width": 48}))
    with pytest.raises(
        FileFormatError, match=r"asuka_alignment_clip\.pt: embed\.weight is \(24, 16\), expected \(48, 16\)"
    ):
        check_start(file, read_alignment(file), shapes_of(other))


def write_decoder(file: Path, module: AsukaDecoder) -> State:
    """As Lightning saves the authors' auto-encoder: LDM's names, an encoder, and layers that nobody uses."""
    state = module.state_dict()
    names = vae_to_diffusers({"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1})
    ldm = {ours: theirs for theirs, ours in names.items()}
    theirs = {}
    for name, value in state.items():
        if name.startswith("condition."):
            theirs[name.replace("condition.", "decoder.encoder.")] = value
        else:
            square = ".attentions." in name and value.ndim == 2
            theirs[ldm[name]] = value[:, :, None, None] if square else value
    theirs |= {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3), "decoder.up_layers.0.deconv.weight": torch.zeros(4)}
    torch.save({"state_dict": theirs, "epoch": 3}, file)
    return state


def test_the_authors_decoder(tmp_path: Path) -> None:
    module = AsukaDecoder(DECODER)
    state = write_decoder(tmp_path / "asuka_decoder.ckpt", module)
    found = read_decoder(tmp_path / "asuka_decoder.ckpt")
    assert_same(found, state)
    assert check_start("file", found, shapes_of(module)) == ()


def test_fluxs_decoder_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "asuka_decoder.ckpt"
    write_decoder(file, AsukaDecoder(DecoderConfig(**{**vars(DECODER), "latent_channels": 16})))
    with pytest.raises(FileFormatError, match=r"conv_in\.weight is \(64, 16, 3, 3\).*FLUX\.1, whose latents have 16"):
        check_start(file, read_decoder(file), shapes_of(AsukaDecoder(DECODER)))


@pytest.mark.parametrize("read", [read_autoencoder, read_alignment, read_decoder])
def test_another_file_is_refused(read: Any, tmp_path: Path) -> None:
    torch.save({"encoder.conv_in.weight": torch.zeros(3)}, tmp_path / "vae.pt")
    with pytest.raises(FileFormatError, match=r"vae\.pt: no "):
        read(tmp_path / "vae.pt")


def test_a_pickle_that_names_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "run",)

    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(1)}, "args": Evil()}, tmp_path / "mae_300.pth")
    with pytest.raises(FileFormatError, match="it is not read"):
        read_autoencoder(tmp_path / "mae_300.pth")
    assert not (tmp_path / "run").exists()
