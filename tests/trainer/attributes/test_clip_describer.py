"""CLIP's zero-shot scores against the formula, on a tiny random CLIP in transformers' files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.vocabulary import USUAL
from dreammix_trt.trainer.data import Photograph

torch = pytest.importorskip("torch", reason="CLIP needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="CLIP needs the extra `train`")


def write_clip(folder: Path, scale: float = 2.6) -> Path:
    """A random CLIP of one layer, with a vocabulary of letters: every word is some tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz-"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    end = vocabulary["<|endoftext|>"]
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokens), "max_position_embeddings": 64, "eos_token_id": end}
    text |= {"bos_token_id": end - 1, "pad_token_id": end, "projection_dim": 8}
    vision = {**tower, "image_size": 32, "patch_size": 16, "projection_dim": 8}
    torch.manual_seed(5)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    model.logit_scale.data.fill_(scale)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


def photograph(seed: int) -> Photograph:
    image = np.random.default_rng(seed).integers(0, 256, (50, 60, 3)).astype(np.uint8)
    subject = np.zeros((50, 60), bool)
    subject[5:45, 10:35] = True
    return Photograph(image, subject, f"{seed}.png")


def by_hand(model: Any, folder: Path, pictures: list[Photograph], kind: str, class_name: str) -> dict[str, float]:
    """Softmax of scale * cosine, averaged over pictures; encoders run one text and one picture at a time."""
    ids = json.loads((folder / "vocab.json").read_text())

    def unit(features: Any) -> Any:
        vector = getattr(features, "pooler_output", features)[0].detach().numpy()
        return vector / np.linalg.norm(vector)

    texts = []
    for word in USUAL[kind]:
        article = "an" if word[0] in "aeiou" else "a"
        words = f"a photo of {article} {word} {class_name}".split()
        row = [ids["<|startoftext|>"], *(ids[sign] for each in words for sign in (*each[:-1], f"{each[-1]}</w>"))]
        texts.append(unit(model.get_text_features(torch.tensor([[*row, ids["<|endoftext|>"]]]))))
    shares = []
    for picture in pictures:
        square = np.full((48, 48, 3), 127, np.uint8)  # 40 pixels high, a tenth around
        square[4:44, 11:36] = picture.image[5:45, 10:35]
        small = np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.BICUBIC)) / 255
        pixels = torch.from_numpy(((small - 0.5) / 0.25).transpose(2, 0, 1)[None])
        seen = unit(model.get_image_features(pixels))
        odds = np.exp([np.exp(2.6) * float(seen @ text) for text in texts])
        shares.append(odds / odds.sum())
    return dict(zip(USUAL[kind], np.mean(shares, 0), strict=True))


def test_scores_are_the_formula_s(folder: Path) -> None:
    from dreammix_trt.trainer.attributes.clip import ClipDescriber

    pictures = [photograph(1), photograph(2)]
    scores = ClipDescriber(folder).score(pictures, "mug")
    assert set(scores) == set(USUAL)
    model = transformers.CLIPModel.from_pretrained(folder).double().eval()
    for kind in ("pattern", "size"):
        wanted = by_hand(model, folder, pictures, kind, "mug")
        assert scores[kind] == pytest.approx(wanted, abs=2e-5)
        assert np.ptp(list(wanted.values())) > 0.02, "random, but not equal"


def test_what_is_likely_is_named_and_the_rest_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from dreammix_trt.trainer.attributes.clip import ClipDescriber

    pictures = [photograph(1)]
    scores = ClipDescriber(folder).score(pictures, "mug")
    best = {kind: max(shares.values()) for kind, shares in scores.items()}
    between = sorted(best.values())
    threshold = (between[2] + between[3]) / 2
    with caplog.at_level(logging.WARNING):
        found = ClipDescriber(folder, threshold).describe(pictures, "mug")
    assert found.source == "clip tiny-clip"
    assert set(found.attributes) == {kind for kind, share in best.items() if share >= threshold}
    for kind, words in found.attributes.items():
        assert words[0] == max(scores[kind], key=scores[kind].__getitem__)
        assert all(scores[kind][word] >= threshold for word in words)
    left = [kind for kind, share in best.items() if share < threshold]
    assert len(left) == 3 and all(f"{kind} is left out: CLIP gives" in caplog.text for kind in left)


def test_what_is_no_clip_is_named(folder: Path, tmp_path: Path) -> None:
    from dreammix_trt.trainer.attributes.clip import ClipDescriber

    with pytest.raises(FileFormatError, match=r"config\.json is missing"):
        ClipDescriber(tmp_path / "nowhere")
    for name, config in (("bert", {"model_type": "bert"}), ("empty", {"model_type": "clip"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match="a model of type 'bert'; give one of type 'clip'"):
        ClipDescriber(tmp_path / "bert")
    with pytest.raises(FileFormatError, match="no whole CLIP of transformers"):
        ClipDescriber(tmp_path / "empty")


def test_weights_that_are_not_there_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from dreammix_trt.trainer.attributes.clip import ClipDescriber

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileFormatError, match=r"its weights lack visual_projection\.weight"):
        ClipDescriber(tmp_path)
