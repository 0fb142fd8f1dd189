"""CLIP-T, CLIP-I and DINO with tiny random networks in transformers' own files; nothing may reach for the network."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.evaluation.metrics.choice import Weights, choose_metrics
from dreammix_trt.evaluation.metrics.encoders import Clip, ClipHole, ClipImage, ClipText, Dino, DinoImage, drop_word
from dreammix_trt.evaluation.metrics.metric import Sample, crop_thing
from dreammix_trt.evaluation.protocol import Subject
from dreammix_trt.evaluation.reading import read_protocol
from tests.support.protocols import write_protocol
from tests.support.tiny_model import make_tiny_vocabulary

pytest.importorskip("transformers", reason="needs the extra eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SIDE = 16


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders clip/, vit/ and dinov2/ as transformers saves them."""
    import torch
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": SIDE, "patch_size": 8}
    vocabulary, merges = make_tiny_vocabulary()
    text = {**small, "intermediate_size": 32, "vocab_size": len(vocabulary), "max_position_embeddings": 12}
    text |= {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    config = CLIPConfig(text_config=text, vision_config={**vision, "intermediate_size": 32}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    ViTModel(ViTConfig(**vision, intermediate_size=32), add_pooling_layer=False).save_pretrained(folder / "vit")
    Dinov2Model(Dinov2Config(**vision)).save_pretrained(folder / "dinov2")
    seen = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "size": {"shortest_edge": 99},
        "crop_size": SIDE,
    }
    for name in ("clip", "vit", "dinov2"):
        (folder / name / "preprocessor_config.json").write_text(json.dumps(seen))
    (folder / "clip/vocab.json").write_text(json.dumps(vocabulary))
    (folder / "clip/merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    marks = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "clip/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **marks}))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    subject = read_protocol(write_protocol(tmp_path / "p", subjects=1)).subjects[0]
    photograph = subject.photographs[0].read()
    return Sample(photograph.image, photograph.image, photograph.subject, subject, "a red SKS mug", "editing", {})


def see(model: Any, crop: Any, *, text: Any = None) -> Any:
    """What a network makes of a crop, by hand: Pillow's bicubic, then mean and deviation."""
    import torch
    from PIL import Image

    pixels = np.asarray(Image.fromarray(crop).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64) / 255
    x = torch.from_numpy(((pixels - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).astype(np.float32)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        return model(x) if text is None else model(input_ids=text, pixel_values=x)


def cosine(one: Any, other: Any) -> float:
    one, other = (np.asarray(each, np.float64).ravel() for each in (one, other))
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_clip_compares_crops_with_the_prompt_and_the_photographs(weights: Path, sample: Sample) -> None:
    import torch
    from transformers import CLIPModel

    clip, model = Clip(weights / "clip", "--clip"), CLIPModel.from_pretrained(weights / "clip").eval()
    vocabulary = json.loads((weights / "clip/vocab.json").read_text())
    words = ["<|startoftext|>", "a</w>", "red</w>", "mug</w>", "<|endoftext|>"]  # without the token
    output = see(model, sample.crop, text=torch.tensor([[vocabulary[word] for word in words]]))
    assert ClipText(clip).add(sample) == pytest.approx(cosine(output.image_embeds, output.text_embeds), abs=1e-5)
    crops = [crop_thing(each.image, each.subject) for each in (file.read() for file in sample.subject.photographs)]
    text = torch.tensor([[0, 1]])
    seen = [see(model, crop, text=text).image_embeds for crop in crops]
    wanted = np.mean([cosine(seen[0], each) for each in seen])
    assert ClipImage(clip).add(sample) == pytest.approx(wanted, abs=1e-5)
    assert clip.embed_text("a red mug " * 30).shape == (8,), "what is too long is cut"


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_dino_compares_class_tokens(kind: str, weights: Path, sample: Sample) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(weights / kind, **({"add_pooling_layer": False} if kind == "vit" else {})).eval()
    crops = [crop_thing(each.image, each.subject) for each in (file.read() for file in sample.subject.photographs)]
    seen = [see(model, crop).last_hidden_state[:, 0] for crop in crops]
    wanted = np.mean([cosine(seen[0], each) for each in seen])
    metric = DinoImage(Dino(weights / kind, "--dino"))
    assert metric.add(sample) == pytest.approx(wanted, abs=1e-5)
    one = replace(sample.subject, name="one", photographs=sample.subject.photographs[:1])
    assert metric.add(replace(sample, subject=one)) == pytest.approx(1, abs=1e-6), "another subject, other references"
    nobody: Subject = replace(sample.subject, name="none", photographs=())
    assert metric.add(replace(sample, subject=nobody)) is None


def test_clip_compares_holes_with_black_around_them(weights: Path, sample: Sample) -> None:
    import torch
    from transformers import CLIPModel

    metric, model = ClipHole(Clip(weights / "clip", "--clip")), CLIPModel.from_pretrained(weights / "clip").eval()
    mask = np.zeros(sample.image.shape[:2], bool)
    mask[5:25, 8:30] = True
    painted = replace(sample, image=255 - sample.image, mask=mask, task="removal")
    assert metric.add(painted) is None, "nobody knows the truth"
    text = torch.tensor([[0, 1]])
    holes = [np.where(mask[..., None], each, 0).astype(np.uint8) for each in (painted.image, sample.scene)]
    seen = [see(model, each, text=text).image_embeds for each in holes]
    assert metric.add(painted.hold_against_scene()) == pytest.approx(cosine(*seen), abs=1e-5)
    assert metric.add(replace(painted, image=sample.scene).hold_against_scene()) == pytest.approx(1, abs=1e-6)


def test_a_folder_of_another_kind_is_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--clip .*has no config\.json"):
        Clip(tmp_path, "--clip")
    with pytest.raises(InputError, match="model_type 'vit'; allowed: clip"):
        Clip(weights / "vit", "--clip")
    shutil.copytree(weights / "vit", tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes(b"cut")
    with pytest.raises(FileFormatError, match=r"--dino .*cut: cannot be loaded"):
        Dino(tmp_path / "cut", "--dino")
    (tmp_path / "cut/model.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"--dino .*cut: cannot be loaded"):
        Dino(tmp_path / "cut", "--dino")
    (tmp_path / "cut/preprocessor_config.json").write_text('{"size": 16}')
    with pytest.raises(FileFormatError, match=r"preprocessor_config\.json: image_mean"):
        Dino(tmp_path / "cut", "--dino")


def test_all_metrics_are_named_whatever_is_given(weights: Path, tmp_path: Path) -> None:
    protocol = read_protocol(write_protocol(tmp_path / "p", subjects=1))
    names = [metric.name for metric in choose_metrics(protocol, Weights())]
    some = choose_metrics(protocol, Weights(clip=weights / "clip", dino=weights / "vit"))
    assert [metric.name for metric in some] == names and len(set(names)) == len(names)
    measured = {metric.name for metric in some if not metric.missing}
    by_pixels = {"psnr", "ssim", "seam_gradient", "psnr_asuka", "ssim_asuka", "grad", "ring_colour"}
    assert measured - {"flip"} == {"clip_t", "clip_i", "clip_hole", "dino"} | by_pixels
    assert all(metric.missing for metric in some if metric.name in ("fid", "lpips", "edit_success"))


def test_a_token_is_dropped_as_a_word() -> None:
    assert drop_word("a SKS mug, sks's and sksy", "sks") == "a mug, 's and sksy"
    assert drop_word("a mug", "") == "a mug"


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_weights_that_are_missing_are_not_drawn_at_random(kind: str, weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(weights / kind, tmp_path / kind)
    file = tmp_path / kind / "model.safetensors"
    state = load_file(file)
    gone = next(name for name in sorted(state) if "layernorm" in name.lower() or "layer_norm" in name)
    save_file({name: value for name, value in state.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(FileFormatError, match="its weights lack"):
        (Clip if kind == "clip" else Dino)(tmp_path / kind, f"--{kind}")
