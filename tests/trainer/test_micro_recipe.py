"""The recipe's parts, and the whole of it in miniature."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("diffusers", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)

from dreammix_trt.core.checkpoint import EMBEDDED  # noqa: E402
from dreammix_trt.trainer.micro import world  # noqa: E402
from dreammix_trt.trainer.micro.captions import WORDS  # noqa: E402
from dreammix_trt.trainer.micro.data import FORMS, Batch, Latents, encode_shard, render_shard  # noqa: E402
from dreammix_trt.trainer.micro.forms import FormLoss, train_form_reader  # noqa: E402
from dreammix_trt.trainer.micro.judge import HEADS, Judge, crop_around, expected_reading  # noqa: E402
from dreammix_trt.trainer.micro.networks import build_unet, build_vae, noise_table  # noqa: E402
from dreammix_trt.trainer.micro.objects import Attributes  # noqa: E402
from dreammix_trt.trainer.micro.parallel import Team  # noqa: E402
from dreammix_trt.trainer.micro.parts import PartLoss, frame_things, train_part_reader  # noqa: E402
from dreammix_trt.trainer.micro.patch import dequantise_delta, quantise_delta  # noqa: E402
from dreammix_trt.trainer.micro.reading import QUESTIONS, UNASKED  # noqa: E402
from dreammix_trt.trainer.micro.scoring import score  # noqa: E402
from dreammix_trt.trainer.micro.ship import sgm_names  # noqa: E402
from dreammix_trt.trainer.micro.tokenizer import PromptTokenizer, save_tokenizers  # noqa: E402
from dreammix_trt.trainer.micro.vae import fold_latent_scale, start_with_colour  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")


def test_every_world_word_is_one_token(tmp_path: Path) -> None:
    save_tokenizers(tmp_path)
    tokens = PromptTokenizer(tmp_path)
    assert [word for word in WORDS if len(tokens.ids(word)) != 1] == []
    assert tokens.eos == tokens.size - 1


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_ids_agree_with_transformers(tmp_path: Path, folder: str) -> None:
    from transformers import CLIPTokenizer

    save_tokenizers(tmp_path)
    theirs, ours = CLIPTokenizer.from_pretrained(tmp_path / folder), PromptTokenizer(tmp_path)
    for prompt in ("a photo of a red sks mug, on a Table", "unglazed zqx 12", "", "it's  wide"):
        ids = theirs(prompt, padding="max_length", max_length=77, truncation=True)["input_ids"]
        assert ids == ours([prompt])[folder == "tokenizer_2"][0].tolist()


def test_sgm_names_are_unique_and_known() -> None:
    names = sgm_names(build_unet())
    assert len(set(names.values())) == len(names)
    assert names["conv_in.weight"] == "input_blocks.0.0.weight"
    assert names["down_blocks.1.attentions.0.proj_in.weight"] == "input_blocks.3.1.proj_in.weight"
    assert names["up_blocks.0.upsamplers.0.conv.weight"] == "output_blocks.1.2.conv.weight"
    assert names["up_blocks.2.resnets.1.conv_shortcut.bias"] == "output_blocks.5.0.skip_connection.bias"


@pytest.mark.parametrize("shape", [(7,), (5, 9), (4, 3, 3, 3)])
def test_quantised_deltas_come_back(shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.01
    codes, low, high = entry = quantise_delta(delta)
    assert codes.dtype == torch.uint8 and codes.shape == delta.shape
    assert low.dtype == high.dtype == torch.float16
    assert low.shape == ((shape[0], *[1] * (len(shape) - 1)) if len(shape) > 1 else ())
    assert float((dequantise_delta(entry).float() - delta).abs().max()) < 0.06 / 255


def test_folding_the_latent_scale_changes_no_picture() -> None:
    torch.manual_seed(0)
    vae = build_vae(32)
    start_with_colour(vae)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mode()).sample
        fold_latent_scale(vae, images)
        latents = vae.encode(images).latent_dist.mode() * 0.13025
        after = vae.decode(latents / 0.13025).sample
    assert float(latents.mean((0, 2, 3)).abs().max()) < 1e-4
    assert float((latents.std((0, 2, 3)) - 1).abs().max()) < 1e-4
    assert float((after - before).abs().max()) < 1e-3


def test_the_judge_in_numpy_is_the_classifier_in_torch(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from dreammix_trt.trainer.micro.classifier import Classifier
    from dreammix_trt.trainer.micro.judge import FACTS_FILE, SIDE, WEIGHTS_FILE

    torch.manual_seed(0)
    model = Classifier().eval()
    save_file(model.state_dict(), tmp_path / WEIGHTS_FILE)
    (tmp_path / FACTS_FILE).write_text("{}")
    crops = [np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), np.uint8) for n in range(3)]
    with torch.no_grad():
        logits, same = model(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1)
    heads, embedded = Judge.load(tmp_path).scores(crops)
    assert np.allclose(np.concatenate(list(heads.values()), 1), logits.numpy(), atol=1e-4)
    assert np.allclose(embedded, same.numpy(), atol=1e-4)


def test_a_score_counts_a_part_where_it_is_asked() -> None:
    bare, full = Attributes("mug", "blue"), Attributes("mug", "blue", foot="red", decal="star", decal_colour="pink")
    wanted = [expected_reading(bare), expected_reading(full)]
    wrong = wanted[1] | {"decal": "heart"}
    assert score(wanted, wanted)["all"] == 1
    shares = score([wanted[0], wrong], wanted)
    assert shares["foot"] == 1 and shares["decal"] == 0 and shares["shape"] == 1
    assert shares["all"] == 0.5 and "top" not in shares
    assert expected_reading(replace(full, decal="bolt"))["decal"] == "other"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred rendered scenes of 128 pixels."""
    work = tmp_path_factory.mktemp("scenes")
    render_shard(Team(0, 1, "cpu"), work, 128, 100, 5)
    return work


def test_lessons_from_scenes_say_what_the_shipped_judge_reads(rendered: Path) -> None:
    from dreammix_trt.trainer.micro.classifier import _Scenes

    scenes = _Scenes(rendered, 1)
    facts = np.load(rendered / "facts_square.npy")
    assert 0 < len(scenes) < int((~facts["empty"]).sum()), "small things are passed over"
    lesson = scenes.draw(3, 48)
    pictures = ((lesson.pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    readings = Judge.load(EMBEDDED).read(list(pictures))
    for head in ("shape", "colour", "foot"):
        answers = lesson.truth[:, list(HEADS).index(head)].tolist()
        hits = [HEADS[head][a] == read[head] for a, read in zip(answers, readings, strict=True) if a >= 0]
        assert len(hits) >= 30 and np.mean(hits) > 0.8


@pytest.fixture(scope="module")
def encoded(rendered: Path) -> Latents:
    """These scenes as latents of an untrained VAE that passes colours."""
    torch.manual_seed(0)
    vae, team = build_vae(128), Team(0, 1, "cpu")
    start_with_colour(vae)
    save_tokenizers(rendered)
    np.save(rendered / "grey.npy", np.zeros((1, 4, 16, 16), np.float32))
    encode_shard(team, rendered, vae.eval(), 128, 5)
    return Latents(rendered, rendered, 128, 5, "cpu")


def test_a_decal_is_asked_for_where_the_caption_names_it(encoded: Latents) -> None:
    batch = encoded.draw(0, 3, 24, 0.0, decals=1.0)
    plain = encoded.draw(0, 3, 24, 0.0)
    words = [encoded._tokens.ids("sticker" if form == "blot" else form)[0] for form in FORMS]
    named = [set(words) & set(ids.tolist()) for ids in batch.ids_one]
    assert len(batch.asked.rows) > len(plain.asked.rows)
    assert set(batch.asked.rows.tolist()) == {row for row, found in enumerate(named) if found}
    for row, form, (top, left) in zip(
        *(getattr(batch.asked, name) for name in ("rows", "forms", "corners")), strict=True
    ):
        assert named[row] == {words[form]}
        seen = batch.detail[row, 0, top : top + encoded.reading, left : left + encoded.reading]
        assert float(seen.max()) == float(batch.detail[row].max()), "the reader sees the decal"


def pull(loss: Any, batch: Batch, told: Any) -> Any:
    """The loss' slope on the noise of timestep 400; checks that it leads down, and that other times are not asked."""
    signal, spread = noise_table()
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    steps = torch.full((len(noise),), 400)
    noisy = signal[400] * batch.latents + spread[400] * noise
    predicted = noise.clone().requires_grad_(True)
    before = loss.measure(noisy, predicted, steps, told)
    (slope,) = torch.autograd.grad(before, predicted)
    after = loss.measure(noisy, noise - 0.05 * slope / slope.abs().max(), steps, told)
    assert float(after) < float(before.detach())
    for out_of_reach in (100, 900):
        assert not loss.measure(noisy, predicted, steps * 0 + out_of_reach, told).any()
    return slope


def test_a_reader_learns_forms_and_pulls_the_noise_towards_the_named_one(encoded: Latents, tmp_path: Path) -> None:
    share = train_form_reader(encoded, 60, tmp_path, 0, batch=16)
    assert share is not None and 0 <= share <= 1
    batch = encoded.draw(0, 3, 24, 0.0, decals=1.0)
    slope = pull(FormLoss(tmp_path, encoded.reading, "cpu"), batch, batch.asked)
    silent = sorted(set(range(24)) - set(batch.asked.rows.tolist()))
    assert not slope[silent].any(), "what no caption names is left alone"


def test_what_a_caption_says_is_what_is_told_of_a_thing(encoded: Latents) -> None:
    batch = encoded.draw(0, 3, 24, 0.0)
    answers = batch.told.answers.tolist()
    assert any(value != UNASKED for row in answers for value in row)
    for row, (ids, box) in zip(answers, zip(batch.ids_one.tolist(), batch.told.boxes, strict=True), strict=True):
        for value, options in zip(row, QUESTIONS.values(), strict=True):
            assert value == UNASKED or encoded._tokens.ids(options[value])[0] in ids
        left, top, right, bottom = box.tolist()
        height, width = batch.latents.shape[-2:]
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    _, told = encoded.read_things(np.arange(8))
    assert (told.answers[:, list(QUESTIONS).index("shape")] != UNASKED).all(), "of a rendered thing all can be said"


def test_a_things_box_fills_what_the_reader_sees() -> None:
    ramp = torch.arange(32.0)[None, None, None, :].expand(1, 1, 32, 32)
    boxes = torch.tensor([[8.0, 4.0, 24.0, 20.0]])
    side = 16 * 1.12  # the box and a margin of 6 % on both sides
    wanted = 16 - side / 2 + (torch.arange(16) + 0.5) * side / 16 - 0.5  # centres of cells; cell 0's lies at 0.5
    for turned, named in ((ramp, boxes), (ramp.mT, boxes[:, [1, 0, 3, 2]])):
        seen = frame_things(turned, named)[0, 0]
        assert torch.allclose(seen if named is boxes else seen.mT, wanted.expand(16, 16), atol=1e-4)


def test_a_reader_learns_parts_and_pulls_the_noise_towards_the_named_ones(encoded: Latents, tmp_path: Path) -> None:
    shares = train_part_reader(encoded, 60, tmp_path, 0, batch=16)
    assert set(shares) <= set(QUESTIONS) and all(0 <= share <= 1 for share in shares.values())
    batch = encoded.draw(0, 3, 24, 0.0)
    slope = pull(PartLoss(tmp_path, "cpu"), batch, batch.told)
    silent = (batch.told.answers == UNASKED).all(1)
    assert silent.any() and not slope[silent].any(), "of what no caption speaks nothing is asked"


@pytest.mark.slow
def test_the_whole_recipe_in_miniature(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    from dreammix_trt.trainer.micro.__main__ import parse
    from dreammix_trt.trainer.micro.recipe import run

    out = tmp_path / "model"
    run(parse(["--out", str(out), "--smoke", "--native-size", "64"]))
    record = json.loads((out / "training.json").read_text())
    assert record["raw"]["steps"] == 3 and "evaluation" in record
    pipeline = StableDiffusionXLPipeline.from_pretrained(out, local_files_only=True)
    assert pipeline.unet.config.addition_embed_type == "text_time"
    patch = torch.load(out / "micro.fooocus.patch", weights_only=True)
    assert patch and all(key.startswith("diffusion_model.") and key.endswith(".weight") for key in patch)
    assert torch.load(out / "inpaint_head.pth", weights_only=True)["head"].shape == (48, 5, 3, 3)
    scene = world.render_scene(np.random.default_rng(0))
    judge, crop = Judge.load(out), crop_around(scene.image, scene.box)
    assert all(word in HEADS[head] for head, word in judge.read([crop])[0].items())
    assert judge.embed([crop]).shape == (1, 64)
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "model.work").glob("*.pt"))
    run(parse(["--out", str(out), "--smoke", "--native-size", "64"]))  # everything is there already
    assert before == sorted(p.stat().st_mtime_ns for p in (tmp_path / "model.work").glob("*.pt"))
