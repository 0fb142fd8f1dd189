"""ASUKA's three trainings, whole: what they write, that they go on to the bit, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

for _name in ("torch", "diffusers", "transformers"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

import torch  # noqa: E402

from dreammix_trt.core.asuka import AsukaConfig  # noqa: E402
from dreammix_trt.core.asuka_folder import AsukaFolder, write_asuka  # noqa: E402
from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import FileFormatError, InputError  # noqa: E402
from dreammix_trt.core.files import hold_alone  # noqa: E402
from dreammix_trt.core.tensors import map_tensors  # noqa: E402
from dreammix_trt.trainer import learning, picture_pool  # noqa: E402
from dreammix_trt.trainer.asuka.alignment import AlignLesson  # noqa: E402
from dreammix_trt.trainer.asuka.recipes import FULL, PARTS, SMALL, AsukaRecipe, Part, recipe_for  # noqa: E402
from dreammix_trt.trainer.asuka.task import config_for  # noqa: E402
from dreammix_trt.trainer.asuka.training import train_asuka  # noqa: E402
from dreammix_trt.trainer.hardware import Hardware  # noqa: E402
from dreammix_trt.trainer.processes import Processes  # noqa: E402
from dreammix_trt.trainer.stepping import Course  # noqa: E402
from tests.support.asuka_training import tiny_recipe, train, write_pictures  # noqa: E402


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures."""
    return write_pictures(tmp_path_factory.mktemp("asuka") / "pictures")


@pytest.fixture(scope="session")
def trained(base: BaseFiles, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prior that is not aligned."""
    out = tmp_path_factory.mktemp("asuka") / "prior"
    train("prior", out, base, images)
    return out


def copy(folder: Path, target: Path) -> Path:
    held = AsukaFolder.open(folder)
    write_asuka(target, held.config, {part: held.weights(part) for part in held.parts}, record=held.read_record())
    return target


def test_the_parts_fill_one_folder(base: BaseFiles, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "asuka"
    for number, part in enumerate(PARTS):
        done = train(part, out, base, images)
        assert (done.part, done.steps) == (part, 3) and done.parameters > 10_000 and np.isfinite(done.loss)
        record = json.loads((out / "train.json").read_text())
        assert list(record) == list(PARTS[: number + 1]) and record[part]["loss"] == done.loss
        if part == "prior":
            only_mae = map_tensors(out / "prior.safetensors")
            assert all(name.startswith("mae.") for name in only_mae)
    aligned = map_tensors(out / "prior.safetensors")
    assert any(name.startswith("alignment.") for name in aligned)
    assert all(np.array_equal(aligned[name], value) for name, value in only_mae.items()), "the prior stays what it was"
    folder = AsukaFolder.open(out)
    assert folder.parts == ("prior", "decoder") and folder.config == config_for(base)
    folder.check_fit(base.configs)
    assert not (tmp_path / "asuka.work" / "prior").exists(), "nothing is left to go on from"
    train("prior", out, base, images, seed=1)
    assert all(name.startswith("mae.") for name in map_tensors(out / "prior.safetensors")), "the old alignment is lost"
    assert list(json.loads((out / "train.json").read_text())) == ["prior", "decoder"]
    assert AsukaFolder.open(out).parts == ("prior", "decoder")


def stop_at(step: int) -> Callable[[str, float, str], None]:
    """Progress that stops the program when a step is done, before its checkpoint."""

    def update(_name: str, _fraction: float, message: str) -> None:
        if message.startswith(f"step {step} "):
            raise KeyboardInterrupt

    return update


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("prior", {"accumulate": 2}),
        ("align", {}),
        ("align", {"views": 3, "accumulate": 2}),
        ("decoder", {}),
    ],
    ids=["prior", "align", "align with views", "decoder"],
)
def test_a_stopped_training_goes_on_to_the_bit(
    part: Part, fields: dict[str, Any], base: BaseFiles, images: Path, trained: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(part, **fields)
    whole, out = (copy(trained, tmp_path / name) for name in ("whole", "asuka"))
    file = "decoder.safetensors" if part == "decoder" else "prior.safetensors"
    before = (out / file).read_bytes() if (out / file).exists() else None
    done = train(part, whole, base, images, recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        train(part, out, base, images, recipe=recipe, progress=stop_at(3))
    assert before == ((out / file).read_bytes() if (out / file).exists() else None), "nothing is written yet"
    checkpoint = tmp_path / "asuka.work" / part / "checkpoint"
    assert json.loads((checkpoint / "checkpoint.json").read_text())["step"] == 2
    for other, message in (
        ({"recipe": replace(recipe, batch=3)}, "batch is 3, and was 2"),
        ({"seed": 9}, "seed is 9, and was 0"),
        ({"recipe": replace(recipe, crop=(0.3, 0.9))}, r"crop is \[0.3, 0.9"),
    ):
        with pytest.raises(InputError, match=message):
            train(part, out, base, images, **{"recipe": recipe, **other}, resume=True)
    with pytest.raises(InputError, match="patch biases is True, and was False"):
        train(part, out, replace(base, patch_biases=True), images, recipe=recipe, resume=True)
    resumed = train(part, out, base, images, recipe=recipe, resume=True)
    assert (resumed.loss, resumed.first_loss) == (done.loss, done.first_loss)
    assert (out / file).read_bytes() == (whole / file).read_bytes() != before
    assert not checkpoint.exists()


def test_views_are_encoded_once(
    base: BaseFiles, images: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("align", views=3)
    out = copy(trained, tmp_path / "asuka")
    first = train("align", out, base, images, recipe=recipe)
    assert len(list((tmp_path / "asuka.work").glob("views-*.safetensors"))) == 1
    monkeypatch.setattr(AlignLesson, "_encode_views", None)
    again = train("align", copy(trained, out), base, images, recipe=recipe)
    assert again.loss == first.loss


def test_the_mean_of_two_processes_is_that_of_one_with_their_rows(
    base: BaseFiles, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes its half of the rows that one process has in a batch of twice the size."""
    drawn: dict[str, list[Any]] = {}
    for name, processes, batch in (
        ("one", Processes(), 4),
        ("first", Processes(0, 2), 2),
        ("second", Processes(1, 2), 2),
    ):
        lesson, recipe = _Noted(), tiny_recipe("prior", batch=batch, steps=2)
        tell = lambda *_: None  # noqa: E731
        course = Course("prior", 2, 1.0, recipe.rate_at, Hardware(), _Nothing(), processes, tell)
        monkeypatch.setattr(Processes, "average", lambda self, parameters, loss: loss)
        learning.learn(lesson, recipe, (0,), course, resume=False)
        drawn[name] = lesson.rows
    assert [a + b for a, b in zip(drawn["first"], drawn["second"], strict=True)] == drawn["one"]
    assert len({number for rows in drawn["one"] for number in rows}) == 8


def test_a_resume_without_a_checkpoint_is_told_before_rooms_are_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_pool, "_render", None)
    with pytest.raises(InputError, match="there is no checkpoint to go on from"):
        train_asuka("prior", tmp_path / "asuka", resume=True)


class _Noted:
    """A lesson that notes which rows it gets."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []
        self._value = torch.nn.Parameter(torch.zeros(()))

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {"value": self._value}

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"number": np.asarray(rng.random(), np.float32)}

    def loss(self, rows: Any, step: int) -> torch.Tensor:
        self.rows.append(rows["number"].tolist())
        return (self._value - rows["number"]).square().mean()


class _Nothing:
    """No checkpoints."""

    def keep(self, *_: Any) -> None: ...


def test_a_part_may_begin_with_weights_of_another_place(
    base: BaseFiles, images: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After one tiny step they are hardly changed, whether they are ours or named as the authors' checkpoint."""
    recipe, one = tiny_recipe("prior", steps=1, learning_rate=1e-6), map_tensors(trained / "prior.safetensors")
    file = tmp_path / "mae_300.pth"
    plain = {name.removeprefix("mae."): torch.tensor(value) for name, value in one.items()}
    torch.save({name: value for name, value in plain.items() if name != "alpha"}, file)
    for number, start in enumerate((trained, file)):
        out = tmp_path / f"asuka{number}"
        train("prior", out, base, images, recipe=recipe, start=start, seed=3)
        other = map_tensors(out / "prior.safetensors")
        far = [name for name in one if not np.allclose(one[name], other[name], atol=2e-3)]
        assert not far or far == ["mae.alpha"], "the file lacks it, so it begins anew"
    assert "lacks 1 tensors, such as mae.alpha: they begin anew" in caplog.text


def test_weights_of_other_networks_are_refused_by_name(
    base: BaseFiles, images: Path, trained: Path, tmp_path: Path
) -> None:
    held = AsukaFolder.open(trained)
    weights = {name: np.array(value) for name, value in held.weights("prior").items()}
    name = "mae.decoder_pred.bias"
    write_asuka(tmp_path / "large", held.config, {"prior": weights | {name: np.zeros(7, np.float32)}})
    with pytest.raises(FileFormatError, match=rf"{name} is \(7,\), expected \(48,\) here"):
        train("prior", tmp_path / "asuka", base, images, start=tmp_path / "large")
    out = copy(trained, tmp_path / "asuka")
    with pytest.raises(FileFormatError, match=r"this part \(align\) was not trained there"):
        train("align", out, base, images, start=trained)
    layers = {"0.weight": torch.zeros(7, 48), "1.linear1.weight": torch.zeros(49, 7), "2.weight": torch.zeros(7)}
    torch.save(layers, tmp_path / "asuka_alignment_clip.pt")
    with pytest.raises(FileFormatError, match=r"alignment\.embed\.weight is \(7, 48\), expected \(64, 48\)"):
        train("align", out, base, images, start=tmp_path / "asuka_alignment_clip.pt")


@pytest.mark.parametrize(
    ("part", "fields", "error", "message"),
    [
        ("align", {}, InputError, r"holds no prior to align; train it first: dreammix-trt train-asuka prior"),
        ("prior", {"perceptual": "vgg.pth"}, InputError, "--perceptual is of the decoder's loss"),
        ("decoder", {"perceptual": "vgg.pth"}, InputError, r"--perceptual vgg\.pth: no such file"),
        ("prior", {"start": "mae_300.pth"}, InputError, r"--start mae_300\.pth: no such file or folder"),
        ("prior", {"seed": -1}, InputError, "seed is -1"),
        ("prior", {"images": None}, InputError, "needs a folder of pictures to learn from"),
        ("prior", {"images": None, "objects": "masks"}, InputError, "--objects needs a folder of pictures"),
        ("prior", {"resume": True}, InputError, "there is no checkpoint to go on from"),
        ("prior", {"hardware": Hardware("tpu")}, InputError, "device is 'tpu'"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    part: Part,
    fields: dict[str, Any],
    error: type[Exception],
    message: str,
    base: BaseFiles,
    images: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        train(part, tmp_path / "asuka", base, **{"images": images, **fields})
    assert not (tmp_path / "asuka").exists()


def test_a_folder_of_another_base_is_refused(base: BaseFiles, images: Path, trained: Path, tmp_path: Path) -> None:
    held = AsukaFolder.open(trained)
    wide = replace(held.config, prior=replace(held.config.prior, context_width=768))
    write_asuka(tmp_path / "asuka", wide, {"prior": held.weights("prior")})
    with pytest.raises(FileFormatError, match="prior: context_width is 768"):
        train("align", tmp_path / "asuka", base, images)


@pytest.mark.parametrize("place", ["asuka", "asuka.work/prior"])
def test_a_second_training_in_a_place_is_refused(base: BaseFiles, images: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    with (
        hold_alone(tmp_path / place, "a test is at work"),
        pytest.raises(InputError, match="another training is at work there"),
    ):
        train("prior", tmp_path / "asuka", base, images)


def test_a_loss_that_is_not_finite_stops_it_and_keeps_the_checkpoint(
    base: BaseFiles, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreammix_trt.trainer.asuka.prior import PriorLesson

    honest = PriorLesson.loss

    def spoil(self: PriorLesson, rows: Any, step: int) -> torch.Tensor:
        return honest(self, rows, step) * (float("nan") if step == 2 else 1)

    monkeypatch.setattr(PriorLesson, "loss", spoil)
    with pytest.raises(InputError, match=r"loss is nan at step 3.*smaller learning rate.*of step 2 is kept"):
        train("prior", tmp_path / "asuka", base, images)
    assert not (tmp_path / "asuka").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be 1 to"),
        ({"side": 100}, "side is 100; it must be a multiple of 64"),
        ({"views": -1}, "views is -1"),
        ({"learning_rate": float("nan")}, "learning rate is nan"),
        ({"crop": (0.9, 0.3)}, "crop is 0.9 to 0.3; give 0 to 1, the smaller one first"),
        ({"guess_times": (600, 200)}, "guess times are 600 to 200; give timesteps"),
        ({"revealed": (1.5, 0.1)}, "revealed is 1.5 to 0.1; give shares"),
    ],
)
def test_recipes_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_recipe("prior", **fields)


def test_recipes_say_how_fast_and_how_often() -> None:
    recipe = AsukaRecipe(steps=110, learning_rate=0.1, batch=1, side=64, warmup=10, revealed=(1.0, 0.1), reveal_steps=9)
    assert recipe.rate_at(0) == pytest.approx(0.01) and recipe.rate_at(9) == pytest.approx(0.1)
    assert recipe.rate_at(60) == pytest.approx(0.05) and 0 < recipe.rate_at(109) < 1e-4
    assert [recipe.revealed_at(step) for step in (0, 3, 9, 50)] == pytest.approx([1.0, 0.7, 0.1, 0.1])
    assert recipe_for("align", 256) is SMALL["align"] and recipe_for("align", 1024) is FULL["align"]


def test_a_full_size_base_gets_the_papers_networks() -> None:
    """By SDXL's own configurations."""
    vae = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    configs = {"unet": {"cross_attention_dim": 2048}, "text_encoder_2": {"projection_dim": 1280}, "vae": vae}
    sdxl: Any = SimpleNamespace(native_side=1024, configs=configs)
    assert config_for(sdxl) == AsukaConfig()


def test_the_embedded_base_is_the_default(tmp_path: Path) -> None:
    """Without a folder its rooms are rendered; one step of its prior."""
    recipe = replace(SMALL["prior"], steps=1, batch=2, rooms=2)
    done = train_asuka("prior", tmp_path / "asuka", recipe=recipe, threads=1)
    assert done.steps == 1 and AsukaFolder.open(tmp_path / "asuka").config.prior.side == 64
    assert next((tmp_path / "asuka.work").iterdir()).name == "rooms-256-2-0.safetensors"
