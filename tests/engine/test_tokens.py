"""Subjects of tokens on random weights: enrolled from pictures, painted on the host, mixed with LoRAs, and refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from dreammix_trt.building import build
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import EngineError, FileFormatError, InputError
from dreammix_trt.core.noise import SeededNoise
from dreammix_trt.core.reference_pictures import place_on_white
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import make_schedule
from dreammix_trt.core.subject import NOBODY, Role, Subject, read_subject, write_subject
from dreammix_trt.core.subject_tokens import mark_cells, select_tokens
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.core.token_factors import read_factors
from dreammix_trt.core.token_rows import Tokens
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.enrolment import encode_class, find_features, read_references
from dreammix_trt.engine.host.denoiser import Conditioning, EngineDenoiser
from dreammix_trt.engine.host.prior import PriorRows, add_prior
from dreammix_trt.engine.host.sampling import StageInputs, take_step
from dreammix_trt.engine.result import read_request
from tests.engine.conftest import make_scene
from tests.engine.test_asuka_requests import Spy
from tests.support.tokens import make_projection, write_small_adapter

FEW: dict[str, Any] = {"num_inference_steps": 3, "seed": 2}
PROMPT = "a red mug on a table"


@pytest.fixture(scope="module")
def adapter(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenAdapter:
    return write_small_adapter(tmp_path_factory.mktemp("adapter") / "small.safetensors", BaseFiles.open(small_base))


@pytest.fixture(scope="module")
def engine(test_home: Path, small_base: Path, adapter: TokenAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "engine"
    build(out=out, base=small_base, tokens=adapter.file)
    return out


@pytest.fixture(scope="module")
def dm(engine: Path, mug_lora: Path) -> Iterator[DreamMix]:
    """With subjects "mug" and "ball" of tokens and "lora" of a LoRA."""
    with DreamMix.load(engine, threads=1) as opened:
        opened.enroll(*draw_object(0), class_name="mug")
        opened.enroll(*draw_object(1), class_name="ball")
        opened.add_subject(mug_lora, "lora")
        yield opened


@pytest.fixture
def spy(dm: DreamMix, monkeypatch: pytest.MonkeyPatch) -> Spy:
    watched = Spy(dm.runtime.networks)
    monkeypatch.setattr(dm.runtime, "networks", watched)
    return watched


def draw_object(seed: int, side: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A photograph of an ellipse of noise on grey, and its mask."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side - 0.5
    mask = (rows / 0.4) ** 2 + (columns / (0.25 + 0.1 * seed)) ** 2 < 1
    picture = np.full((side, side, 3), 128, np.uint8)
    blocks = rng.integers(0, 256, (-(-side // 8), -(-side // 8), 3), np.uint8).repeat(8, 0).repeat(8, 1)[:side, :side]
    picture[mask] = blocks[mask]
    return picture, np.uint8(255) * mask


def paint(dm: DreamMix, prompt: str = PROMPT, **fields: Any) -> np.ndarray:
    return np.asarray(dm.inpaint(*make_scene(), prompt, **{**FEW, **fields}).images[0])


def rows_of(dm: DreamMix, name: str) -> np.ndarray:
    tokens = dm._roster._subjects[name].tokens
    assert tokens is not None
    return tokens.rows


# -- enrolling --------------------------------------------------------------------------------------------------------


def test_the_rows_are_those_that_the_adapter_was_trained_on(dm: DreamMix, small_base: Path, adapter: Any) -> None:
    """The trainer's own torch code up to the tokens, then the projection by hand in float64."""
    import torch

    from dreammix_trt.trainer.hardware import Hardware
    from dreammix_trt.trainer.tokens.encoding import ObjectEncoder

    encoder = ObjectEncoder(BaseFiles.open(small_base), adapter.config, Hardware("cpu"))
    image, seen = place_on_white(*draw_object(0), adapter.config.side)
    latent = encoder._vae.encode(image[None])
    inside = torch.from_numpy(mark_cells(seen, adapter.config))[None]
    tokens = encoder._select(latent, inside, "mug")[0].numpy().astype(np.float64)
    held = {name: value.astype(np.float64) for name, value in make_projection(adapter.config).items()}
    normal = (tokens - tokens.mean(1, keepdims=True)) / np.sqrt(tokens.var(1, keepdims=True) + 1e-5)
    wanted = (normal * held["norm.weight"] + held["norm.bias"]) @ held["linear.weight"].T + held["linear.bias"]
    found = rows_of(dm, "mug")
    assert found.shape == (adapter.config.tokens, adapter.config.context_width)
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())  # the file's are float16


def test_several_photographs_are_selected_from_together(dm: DreamMix, adapter: TokenAdapter) -> None:
    photos, masks = zip(*(draw_object(seed) for seed in (0, 1)), strict=True)
    subject = dm.enroll(list(photos), list(masks), class_name="mug", name="both")
    networks, config = dm.networks, adapter.config
    references = read_references(list(photos), list(masks), None, config)
    text = encode_class("mug", dm.tokenizers, networks)
    features = find_features(references, text, networks, dm.facts, config)
    inside = np.concatenate([each.inside for each in references])
    tokens, chosen = select_tokens(np.concatenate(features), inside, config.tokens)
    assert {*(chosen >= config.cells)} == {False, True}, "of both"
    wanted = networks.run("token_proj", tokens=tokens[None])["token_rows"][0].astype(np.float16)
    assert subject.tokens is not None
    np.testing.assert_array_equal(subject.tokens.rows, wanted)
    alone = [dm.enroll(photo, mask, class_name="mug", name="both") for photo, mask in zip(photos, masks, strict=True)]
    assert len({subject.source_sha256, *(each.source_sha256 for each in alone)}) == 3
    dm.remove_subject("both")


def test_the_mask_comes_from_the_cut_out_or_a_segmenter(dm: DreamMix) -> None:
    photo, mask = draw_object(0)
    asked = []

    def segment(rgb: np.ndarray) -> np.ndarray:
        asked.append(rgb)
        return mask

    cut = Image.fromarray(np.dstack([photo, mask]))
    for image, segmenter, calls in ((photo, segment, 1), (cut, segment, 1), (cut, None, 1)):
        found = dm.enroll(image, class_name="mug", name="again", segment=segmenter)
        assert found.tokens is not None and len(asked) == calls
        np.testing.assert_array_equal(found.tokens.rows, rows_of(dm, "mug"))
    dm.remove_subject("again")


def test_the_file_paints_what_was_enrolled(dm: DreamMix, engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "mug.safetensors"
    subject = dm.enroll(*draw_object(0), class_name="alarm clock", out=file)
    assert (subject.name, subject.token, subject.kind, subject.target) == ("alarm-clock", "", "tokens", "patched")
    assert file.stat().st_size < 20_000 and read_subject(file).kind == "tokens"
    dm.remove_subject("alarm-clock")
    with DreamMix.load(engine, threads=1) as other:
        assert other.add_subject(file) == "alarm-clock"
        again = paint(other)
    dm.add_subject(subject)
    np.testing.assert_array_equal(again, paint(dm, subject="alarm-clock"))
    dm.remove_subject("alarm-clock")


# -- painting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"token_count": 5}, {"token_weight": 0.5, "guidance_scale": 1.0}], ids=str)
def test_both_branches_read_the_first_rows_behind_the_text(fields: Any, dm: DreamMix, spy: Spy) -> None:
    paint(dm, subject="", **{name: value for name, value in fields.items() if name == "guidance_scale"})
    plain = [arrays["encoder_hidden_states"] for arrays in spy.of("unet_kv")]
    spy.calls.clear()
    paint(dm, subject="mug", **fields)
    count, weight = fields.get("token_count", 24), np.float32(fields.get("token_weight", 1))
    found = [arrays["encoder_hidden_states"] for arrays in spy.of("unet_kv")]
    assert len(found) == len(plain) > 0
    for text, without in zip(found, plain, strict=True):
        assert text.shape == (1 if "guidance_scale" in fields else 2, 77 + count, without.shape[2])
        np.testing.assert_array_equal(text[:, :77], without)
        for row in text:
            np.testing.assert_array_equal(row[77:], weight * rows_of(dm, "mug")[:count])


def test_without_weight_it_is_the_picture_without_tokens(dm: DreamMix, small_base: Path, tmp_path: Path) -> None:
    none = paint(dm, subject="")
    np.testing.assert_array_equal(paint(dm, subject="mug", token_weight=0), none)
    np.testing.assert_array_equal(paint(dm, subject="mug", token_subject=""), none)
    np.testing.assert_array_equal(paint(dm, subject="mug", token_subject="mug"), paint(dm, subject="mug"))
    assert (paint(dm, subject="mug") != none).any()
    build(out=tmp_path / "plain", base=small_base)
    with DreamMix.load(tmp_path / "plain", threads=1) as plain:  # an engine without an adapter
        np.testing.assert_array_equal(paint(plain), none)
        with pytest.raises(EngineError, match=r"no token adapter.*`dreammix-trt build --tokens ADAPTER`"):
            plain.enroll(*draw_object(0), class_name="mug")
        tokens = Tokens(rows_of(dm, "mug"), "ab" * 32)
        with pytest.raises(FileFormatError, match=r"token adapter abababababab, and this engine has none"):
            plain.add_subject(Subject("mug", "", "mug", tokens=tokens))


def test_the_adapters_factors_are_merged_beside_those_of_a_lora(dm: DreamMix, adapter: TokenAdapter) -> None:
    """W + s A B + A' B' in float64, rounded once."""
    weights: Any = dm.runtime._weights  # type: ignore[attr-defined]
    own, lora = read_factors(adapter), dm._roster._subjects["lora"]
    for network in ("unet", "unet_kv", "unet_raw_kv"):
        slots = dm.networks.slots(network)
        pristine = dm.networks.weights(network)
        for role, scale in ((Role("", 1.0, True), 0.0), (Role("lora", 0.5, True), 0.5), (Role("lora", 0.5), None)):
            merged = weights.use(role)(network)
            for slot in slots:
                wanted = slot.view(pristine[slot.weight]).astype(np.float64)
                if scale is not None:
                    a, b = (each.astype(np.float64) for each in own[network.removesuffix("_kv")][slot.module])
                    wanted = wanted + a @ b
                pair = lora.factors_for(network).get(slot.module)
                if role.name and pair is not None:
                    wanted = wanted + 0.5 * pair[0].astype(np.float64) @ pair[1].astype(np.float64)
                found = slot.view(merged.get(slot.weight, pristine[slot.weight]))
                np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    assert weights.use(NOBODY)("unet") == {}


def test_a_lora_and_tokens_at_once(dm: DreamMix) -> None:
    prompt = "a red sks mug"
    result = dm.inpaint(*make_scene(), prompt, subject="lora", token_subject="mug", **FEW)
    pictures = [paint(dm, prompt, subject=name) for name in ("lora", "mug", "")] + [np.asarray(result.images[0])]
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert (result.origin.subject, result.origin.token_subject) == ("lora", "mug") and not result.warnings
    lora = dm._roster._subjects["lora"]
    dm.add_subject(replace(lora, name="one", tokens=Tokens(rows_of(dm, "mug"), dm.runtime.adapter.sha256)))  # type: ignore[union-attr]
    np.testing.assert_array_equal(paint(dm, prompt, subject="one"), pictures[3])
    np.testing.assert_array_equal(paint(dm, prompt, subject="one", token_subject=""), pictures[0])
    dm.remove_subject("one")


def test_subjects_of_both_kinds_share_a_batch_and_come_back_exactly(dm: DreamMix) -> None:
    names = ("mug", "lora", "ball", "", "mug")
    alone = {name: paint(dm, "a sks mug", subject=name) for name in names}
    jobs = [(*make_scene(), dm.request("a sks mug", subject=name, **FEW)) for name in names]
    results = dm.inpaint_batch(jobs)  # type: ignore[arg-type]
    for name, result in zip(names, results, strict=True):
        np.testing.assert_array_equal(np.asarray(result.images[0]), alone[name])
    assert len({picture.tobytes() for picture in alone.values()}) == 4
    works = dm._lay_out(dm_job(dm, "mug")).works + dm._lay_out(dm_job(dm, "ball")).works
    assert works[0].subject == works[1].subject == Role("", 1.0, True), "one merge serves all subjects of tokens"


def dm_job(dm: DreamMix, subject: str) -> Any:
    from dreammix_trt.engine.dreammix import Job

    return Job(*make_scene(), dm.request(PROMPT, subject=subject, **FEW))


@pytest.mark.parametrize(("scale", "branch"), [(0.0, 0), (1.0, 1)])
def test_guidance_of_nothing_and_of_one_are_the_two_branches(scale: float, branch: int, dm: DreamMix) -> None:
    """eps(0, c_r) + w (eps(c, c_r) - eps(0, c_r)), equation 5: the tokens stand in both."""
    rng = np.random.default_rng(0)
    rows = rows_of(dm, "mug")[:24]
    texts = rng.standard_normal((2, 77, rows.shape[1])).astype(np.float32)
    texts[0] = 0
    texts = np.concatenate([texts, np.repeat(rows[None], 2, 0)], axis=1)
    pooled = rng.standard_normal((2, dm.networks.entries["unet"]["inputs"][2]["shape"][1])).astype(np.float32)
    latent, mask = rng.standard_normal((1, 4, 16, 16)).astype(np.float32), np.ones((1, 1, 16, 16), np.float32)
    feature = np.zeros((1, dm.facts.feature_channels, 16, 16), np.float32)
    plain = {"size_guidance_positive": 1.0, "size_guidance_negative": 1.0, "sharpness": 0.0}
    step = replace(make_schedule(Request("", num_inference_steps=4, **plain), raw_unet=True)[0], guidance_scale=scale)

    def predict(chosen: slice) -> np.ndarray:
        stage = Conditioning(texts[chosen], pooled[chosen], ((128, 128),), 128, feature)
        inputs = StageInputs(latent, latent, mask, stage)
        return take_step(step, inputs, None, EngineDenoiser(dm.networks), [SeededNoise(1)], False).x0

    both, alone = predict(slice(None)), predict(slice(branch, branch + 1))
    np.testing.assert_allclose(both, alone, atol=1e-4 * np.abs(alone).max())
    assert np.abs(both - predict(slice(1 - branch, 2 - branch))).max() > 1e-2 * np.abs(alone).max()


@pytest.mark.parametrize("prior", ["alone", "concat", "negative"])
def test_tokens_stay_where_asukas_prior_takes_the_place_of_text(prior: Any) -> None:
    rng = np.random.default_rng(0)
    text = rng.standard_normal((2, 9, 4)).astype(np.float32)
    text[0, 7:] = text[1, 7:]  # two tokens
    rows = PriorRows(rng.standard_normal((1, 5, 4), np.float32), rng.standard_normal((1, 3), np.float32))
    text = text[1:] if prior == "alone" else text
    plain = Conditioning(text, np.ones((len(text), 3), np.float32), ((8, 8),), 8, np.zeros(0))
    request = Request("", prior=prior, guidance_scale=1 if prior == "alone" else 4)
    made = add_prior(plain, request, rows, 2)
    tokens = {row.tobytes() for row in text[-1, 7:]}
    for found in (made, made.negative or made):
        for condition in found.text:
            assert {row.tobytes() for row in condition} >= tokens
    shapes = {"alone": [(1, 7, 4)], "concat": [(2, 14, 4)], "negative": [(1, 9, 4), (1, 7, 4)]}[prior]
    assert [each.text.shape for each in (made, made.negative) if each is not None] == shapes


def test_the_picture_says_how_its_tokens_were_used(dm: DreamMix) -> None:
    result = dm.inpaint(*make_scene(), PROMPT, subject="mug", token_count=7, token_weight=0.5, **FEW)
    request = read_request(result.to_bytes("png"))
    assert (request.subject, request.token_count, request.token_weight) == ("mug", 7, 0.5)
    assert result.warnings == (), "no word is missing from the prompt"
    assert (result.origin.subject, result.origin.token_subject) == ("mug", "mug")
    assert result.origin.subject_sha256 == dm._roster._subjects["mug"].source_sha256


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mask": None}, r"image has no mask: give one of its size.*\(mask, --mask\).*\(segment, --segment FILE\)"),
        ({"mask": np.zeros((96, 96), np.uint8)}, "mask is empty"),
        ({"mask": np.full((96, 96), 255, np.uint8)}, "marks the whole picture, so nothing tells the object"),
        ({"mask": np.full((96, 95), 255, np.uint8)}, r"95x96 but the image is 96x96"),
        ({"mask": [None, None]}, "1 photographs and 2 masks"),
        ({"image": []}, "image is an empty list"),
        ({"mask": None, "segment": lambda rgb: None}, "the segmenter sees no object in image"),
        ({"class_name": " "}, "class_name is empty"),
        ({"name": "a/b"}, "the name 'a/b' cannot be"),
        ({"name": "lora"}, "name is 'lora': a subject of a LoRA is loaded under it, and this one is of tokens"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_cannot_be_enrolled(given: dict[str, Any], told: str, dm: DreamMix) -> None:
    before = dm.subjects
    photo, mask = draw_object(0)
    with pytest.raises(InputError, match=told):
        dm.enroll(**{"image": photo, "mask": mask, "class_name": "cup", **given})
    assert dm.subjects == before


@pytest.mark.parametrize(
    ("side", "width", "told"),
    [
        (20, 20, r"object is 13x15 pixels, less than 4 cells of 16: .*expect its colours and rough shape"),
        (96, 6, r"object covers \d+ cells, and its further tokens are of the white beside it"),
        (96, 96, ""),
    ],
)
def test_what_to_expect_of_a_small_object_is_said(
    side: int, width: int, told: str, dm: DreamMix, caplog: pytest.LogCaptureFixture
) -> None:
    photo, mask = draw_object(1, side)
    start = (side - width) // 2
    mask[:, :start], mask[:, start + width :] = 0, 0
    dm.enroll(photo, mask, class_name="cup")
    dm.remove_subject("cup")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(told) and all(re.search(told, text) for text in said)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"token_count": 0}, "token_count is 0; allowed: a whole number from 1 to 48"),
        ({"token_count": 49}, "token_count is 49; allowed: a whole number from 1 to 48"),
        ({"token_weight": 2.5}, "token_weight is 2.5; allowed: a number from 0 to 2"),
        ({"subject": "cup"}, "subject is 'cup'; loaded are: 'mug', 'ball', 'lora'"),
        ({"subject": "mug", "subject_scale": 0.5}, "subject 'mug' is of tokens and has no LoRA: set token_weight"),
        ({"subject": "lora", "token_subject": "lora2"}, "token_subject is 'lora2'; loaded are"),
        ({"subject": "mug", "token_subject": "lora"}, "token_subject is 'lora', which is of a LoRA and has no tokens"),
        ({"subject": "lora", "token_subject": "lora"}, "token_subject is 'lora', which is of a LoRA and has no tokens"),
        ({"subject": "mug", "token_subject": "ball"}, "are both of tokens, and a request has those of one"),
        ({"subject": "mug", "substitute": ["blue"]}, "subject 'mug' is of tokens.*smaller token_count than 24"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(fields: Any, told: str, dm: DreamMix) -> None:
    with pytest.raises(InputError, match=told):
        dm.iterate(*make_scene(), PROMPT, **{**FEW, **fields})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"subject": "", "token_count": 5}, "token_count is 5 and does nothing: the subject has no tokens"),
        ({"subject": "mug", "substitute": "auto"}, "nothing is taken out: subject 'mug' is of tokens"),
        ({"subject": None, "prompt": "a sks mug"}, "it names 'sks', which is subject 'lora', and 'mug' is painted"),
    ],
    ids=str,
)
def test_what_does_nothing_is_said(fields: dict[str, Any], told: str, dm: DreamMix) -> None:
    fields = {"prompt": PROMPT, **FEW, **fields}
    job = dm_job(dm, "mug")._replace(request=Request(**fields))
    assert any(told in warning for warning in dm._lay_out(job).warnings)


def test_a_name_and_an_adapter_of_another_kind_are_refused(dm: DreamMix, mug_lora: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="name is 'mug': a subject of tokens is loaded under it, and this one is of a LoRA"
    ):
        dm.add_subject(mug_lora, "mug")
    file = tmp_path / "x.safetensors"
    write_subject(file, Subject("x", "", "mug", tokens=Tokens(rows_of(dm, "mug"), "12" * 32)))
    with pytest.raises(
        FileFormatError, match=r"x\.safetensors: its tokens were made with the token adapter 121212121212"
    ):
        dm.add_subject(file)
    own = dm.runtime.adapter
    assert own is not None
    with pytest.raises(FileFormatError, match="its tokens are 3 wide, and this base's text condition is 160"):
        dm.add_subject(Subject("x", "", "mug", tokens=Tokens(np.ones((4, 3), np.float32), own.sha256)))
    assert dm.subjects == ("mug", "ball", "lora")


def test_an_engine_whose_adapter_is_gone_or_changed_is_refused(engine: Path, adapter: Any, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "engine"
    shutil.copytree(engine, copy)
    file = copy / "token_adapter.safetensors"
    assert file.read_bytes() == adapter.file.read_bytes()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for _ in range(2):
        with pytest.raises(EngineError, match=r"token_adapter\.safetensors.*build it again: `dreammix-trt build"):
            DreamMix.load(copy)
        file.unlink(missing_ok=True)


def test_without_slots_there_is_no_place_for_the_adapter(dm: DreamMix, adapter: TokenAdapter) -> None:
    class Fixed(Spy):
        def slots(self, name: str) -> tuple[()]:
            return ()

    with (
        DreamMix.on_host(Fixed(dm.networks), dm.facts, dm.tokenizers, adapter=adapter) as fixed,
        pytest.raises(FileFormatError, match="built with --no-slots"),
    ):
        fixed.enroll(*draw_object(0), class_name="mug")
