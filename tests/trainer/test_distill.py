"""Distillation: the consistency target by hand, a LoRA that `build` merges, resume to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

import torch  # noqa: E402

from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import InputError  # noqa: E402
from dreammix_trt.core.files import hold_alone, sha256_of  # noqa: E402
from dreammix_trt.core.lora import read_lora  # noqa: E402
from dreammix_trt.core.network_weights import BaseLora, whole_weights_of  # noqa: E402
from dreammix_trt.core.schedule import lcm_coefficients, model_sigmas  # noqa: E402
from dreammix_trt.core.tensors import map_tensors  # noqa: E402
from dreammix_trt.trainer import distiller, networks  # noqa: E402
from dreammix_trt.trainer.consistency import HUBER, OUTSIDE, Tables, consistency_target, huber_loss  # noqa: E402
from dreammix_trt.trainer.distill import FILE_NAME, Distilled, DistillRecipe, distill_lora  # noqa: E402
from dreammix_trt.trainer.distill_task import GRID, DistillTask  # noqa: E402
from dreammix_trt.trainer.hardware import Hardware  # noqa: E402
from dreammix_trt.trainer.processes import use_threads  # noqa: E402
from dreammix_trt.trainer.regular_folder import read_regular  # noqa: E402
from tests.support.training import write_regular  # noqa: E402

TINY = DistillRecipe(steps=3, learning_rate=0.01, batch=2, views=3, rank=2, checkpoint_every=2)
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
TABLES = Tables(torch.tensor(ALPHAS).sqrt(), (1 - torch.tensor(ALPHAS)).sqrt())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with use_threads(1):
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two noisy pictures with masks."""
    return write_regular(tmp_path_factory.mktemp("pictures") / "regular_mug")


def distil(out: Path, base: BaseFiles, pictures: Path | None, **fields: Any) -> Distilled:
    return distill_lora(out, base=base, pictures=pictures, **{"recipe": TINY, "threads": 1} | fields)


def test_the_target_is_the_formula_by_hand() -> None:
    """Two latents, other numbers each, in numpy from Luo et al.'s equations 13, 14 and 9."""
    rng, guidance, times, later = (
        np.random.default_rng(1),
        np.array([3.0, 6.0]),
        np.array([999, 139]),
        np.array([899, 0]),
    )
    x, away, towards = rng.normal(size=(3, 2, 4, 3, 5))
    asked: list[np.ndarray[Any, Any]] = []

    def student(latents: torch.Tensor, when: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        asked.append(sizes.numpy())
        return 0.3 * latents + when.double()[:, None, None, None] / 1000

    wanted = []
    for row in range(2):
        t, s = times[row], later[row]
        (at, bt), (as_, bs) = ((np.sqrt(ALPHAS[i]), np.sqrt(1 - ALPHAS[i])) for i in (t, s))
        eps = away[row] + guidance[row] * (towards[row] - away[row])
        nearer = as_ * (x[row] - bt * eps) / at + bs * eps
        original = (nearer - bs * (0.3 * nearer + s / 1000)) / as_
        skip, out = 0.25 / ((10 * s) ** 2 + 0.25), 10 * s / np.sqrt((10 * s) ** 2 + 0.25)
        wanted.append(skip * nearer + out * original)
    found = consistency_target(
        TABLES,
        (torch.tensor(away), torch.tensor(towards)),
        student,
        torch.tensor(x),
        (torch.tensor(times), torch.tensor(later)),
        torch.tensor(guidance),
        64,
    )
    np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-12, atol=1e-12)
    # 24 x 40 pixels; the loop tells 1.5 times the size in its first three tenths
    np.testing.assert_array_equal(asked[0], [[36, 60, 0, 0, 64, 64], [24, 40, 0, 0, 64, 64]])


@pytest.mark.parametrize("t", [19, 259, 999])
def test_the_consistency_function_is_the_samplers(t: int) -> None:
    sigma = float(model_sigmas()[t])
    c_x, c_x0, _, _ = lcm_coefficients(t, sigma, 0.0)
    x, eps = torch.randn(2, 1, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    exploding = x * np.sqrt(1 + sigma**2)
    wanted = c_x * exploding + c_x0 * (exploding - sigma * eps)
    found = TABLES.consistency(x, eps, torch.tensor([t]))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_student_that_knows_the_picture_has_no_loss() -> None:
    """One picture alone exists, so its noise prediction is exact, and every point leads to it."""
    picture, noise = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def know(latents: torch.Tensor, when: torch.Tensor, _sizes: torch.Tensor) -> torch.Tensor:
        signal, spread = TABLES.at(when)
        return (latents - signal * picture) / spread

    mask = torch.ones(1, 1, 4, 4)
    for t, after in ((999, 899), (519, 19)):
        times = torch.tensor([t]), torch.tensor([after])
        signal, spread = TABLES.at(times[0])
        x = signal * picture + spread * noise
        exact = know(x, times[0], x)
        target = consistency_target(TABLES, (exact, exact), know, x, times, torch.tensor([4.0]), 64)
        assert huber_loss(TABLES.consistency(x, exact, times[0]), target, mask) < 1e-6
        assert huber_loss(TABLES.consistency(x, exact + 0.1, times[0]), target, mask) > 0.01


def test_the_loss_weighs_the_hole() -> None:
    found, target = torch.tensor([[[[0.3, 0.0]]]]), torch.tensor([[[[0.0, 0.4]]]])
    mask = torch.tensor([[[[1.0, 0.0]]]])
    inside, outside = (np.sqrt(d * d + HUBER**2) - HUBER for d in (0.3, 0.4))
    assert float(huber_loss(found, target, mask)) == pytest.approx((inside + OUTSIDE * outside) / (1 + OUTSIDE))


def test_the_lora_is_what_build_merges(base: BaseFiles, pictures: Path, tmp_path: Path) -> None:
    """Read by the reader of `build`, W + B A of every layer, convolutions too; in float16, and a little of it moved."""
    done = distil(tmp_path / "lcm", base, pictures)
    file = tmp_path / "lcm" / FILE_NAME
    held, lora = map_tensors(file), read_lora(file, base.configs["unet"])
    assert done.bytes == file.stat().st_size and {value.dtype.name for value in held.values()} == {"float16"}
    card = json.loads((tmp_path / "lcm" / "distill.json").read_text())
    assert (card["sha256"], card["steps"], card["settings"]["guidance"]) == (sha256_of(file), 3, [4.0, 4.0])
    assert lora.metadata["distillation"] == "lcm" and "token" not in lora.metadata
    before, after = (whole_weights_of(base, "unet", loras) for loras in ([], [BaseLora(lora)]))
    kinds = set()
    for name in lora.factors["unet"]:
        down, up = (held[f"unet.{name}.lora.{side}.weight"].astype(np.float64) for side in ("down", "up"))
        change = (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(before[f"{name}.weight"].shape)
        np.testing.assert_allclose(after[f"{name}.weight"] - before[f"{name}.weight"], change, atol=1e-5)
        assert np.abs(change).max() > 1e-4, name
        kinds.add(change.ndim)
    assert kinds == {2, 4}


def test_the_teacher_is_the_base_itself(
    base: BaseFiles, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its predictions are those of a UNet without adapters, told a smaller size without the text."""
    task = DistillTask(base, TINY, read_regular(pictures))
    told: list[Any] = []
    honest = distiller.consistency_target

    def spy(*given: Any) -> torch.Tensor:
        told.append(given)
        return honest(*given)

    monkeypatch.setattr(distiller, "consistency_target", spy)
    learner = distiller.Distiller(task, tmp_path, lambda *_: None)
    rows = distiller.draw_rows(learner._scenes.samples, 2, (2.0, 5.0), torch.Generator().manual_seed(3))
    rows = replace(rows, t=torch.tensor([999, 99]))
    torch.nn.init.normal_(learner._trained[1])  # the student is another network now
    loss = learner.loss(rows)
    loss.backward()
    assert all(value.grad is not None for value in learner._trained)
    _, teacher, student, x, (t, after), guidance, _ = told[0]
    assert t.tolist() == [999, 99] and after.tolist() == [899, 0] and torch.equal(guidance, rows.guidance)
    bare = networks.TrainingUNet(base, Hardware())
    samples, scenes = rows.samples, learner._scenes
    feature = bare.feature(samples.mask, samples.masked)
    for number, (captions, big) in enumerate(((samples.captions * 0, 0.8), (samples.captions, 1.5))):
        sizes = torch.tensor([[64 * f, 64 * f, 0, 0, 64, 64] for f in (big, 1.0)])
        wanted = bare.predict(x, t, scenes.text(captions), sizes, feature)
        torch.testing.assert_close(teacher[number], wanted)
        assert not torch.allclose(student(x, t, sizes), wanted, atol=1e-3)


def test_rows_are_spread_over_the_timesteps(base: BaseFiles, pictures: Path, tmp_path: Path) -> None:
    samples = DistillTask(base, TINY, read_regular(pictures)).scenes(tmp_path).samples
    rows = distiller.draw_rows(samples, 50, (2.0, 5.0), torch.Generator().manual_seed(3))
    assert sorted(rows.t.tolist()) == GRID == list(range(19, 1000, 20))
    assert 2 <= rows.guidance.min() < 2.5 and 4.5 < rows.guidance.max() <= 5


def stop_at(step: int) -> Callable[[str, float, str], None]:
    """Progress that stops the program when a step is done, before its checkpoint."""

    def update(_name: str, fraction: float, _message: str) -> None:
        if fraction >= step / TINY.steps - 1e-9:
            raise KeyboardInterrupt

    return update


def test_a_stopped_distillation_goes_on_to_the_bit(
    base: BaseFiles, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(TINY, accumulate=2, guidance=(3.0, 6.0))
    whole = distil(tmp_path / "whole", base, pictures, recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path / "lcm", base, pictures, recipe=recipe, progress=stop_at(3))
    assert not (tmp_path / "lcm").exists()
    checkpoint = tmp_path / "lcm.work" / "checkpoint"
    assert json.loads((checkpoint / "checkpoint.json").read_text())["step"] == 2
    assert read_lora(checkpoint, base.configs["unet"]).metadata["distillation"] == "lcm", "the LoRA so far can be built"
    for other, message in (
        ({"skip": 4}, "skip is 4, and was 5"),
        ({"guidance": (3.0, 5.0)}, r"guidance is \[3.0, 5.0"),
    ):
        with pytest.raises(InputError, match=message):
            distil(tmp_path / "lcm", base, pictures, recipe=replace(recipe, **other), resume=True)
    with pytest.raises(InputError, match="patch biases is True, and was False"):
        distil(tmp_path / "lcm", replace(base, patch_biases=True), pictures, recipe=recipe, resume=True)
    monkeypatch.setattr("dreammix_trt.trainer.distill_task.encode_scenes", None)  # nothing is encoded again
    resumed = distil(tmp_path / "lcm", base, pictures, recipe=recipe, resume=True)
    assert (resumed.loss, resumed.first_loss) == (whole.loss, whole.first_loss)
    assert (tmp_path / "lcm" / FILE_NAME).read_bytes() == (tmp_path / "whole" / FILE_NAME).read_bytes()
    assert not checkpoint.exists()


def test_rendered_scenes_are_the_embedded_bases_own(base: BaseFiles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs pictures to be distilled on \(--pictures FOLDER"):
        distil(tmp_path / "lcm", base, None)
    samples = DistillTask(BaseFiles.open(), replace(TINY, views=2)).scenes(tmp_path).samples
    assert samples.latents.shape == (2, 4, 32, 32) and 0 < samples.mask.mean() < 1


def test_pictures_without_masks_are_refused(base: BaseFiles, tmp_path: Path) -> None:
    folder = tmp_path / "regular_mug" / "a_photo_of_a_mug"
    folder.mkdir(parents=True)
    Image.new("RGB", (80, 80)).save(folder / "0-image.png")
    with pytest.raises(InputError, match="none of the pictures has a mask"):
        distil(tmp_path / "lcm", base, tmp_path / "regular_mug")


def test_a_loss_that_is_not_finite_stops_it_and_keeps_the_checkpoint(
    base: BaseFiles, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, count = distiller.huber_loss, iter(range(3))
    monkeypatch.setattr(distiller, "huber_loss", lambda *a: honest(*a) * (float("nan") if next(count) == 2 else 1))
    with pytest.raises(InputError, match=r"loss is nan at step 3.*smaller learning rate than 0.01.*of step 2 is kept"):
        distil(tmp_path / "lcm", base, pictures)
    assert not (tmp_path / "lcm").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be 1 to 100000"),
        ({"rank": 257}, "rank is 257; it must be 1 to 256"),
        ({"skip": 51}, "skip is 51; it must be 1 to 50"),
        ({"checkpoint_every": -1}, "checkpoint every is -1"),
        ({"learning_rate": float("nan")}, "learning rate is nan"),
        ({"guidance": (6.0, 3.0)}, "guidance is 6 to 3; give 1 to 100"),
        ({"guidance": (0.5, 3.0)}, "guidance is 0.5 to 3"),
    ],
)
def test_recipes_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **fields)


@pytest.mark.parametrize("place", ["lcm", "lcm.work"])
def test_a_second_distillation_in_a_place_is_refused(
    base: BaseFiles, pictures: Path, tmp_path: Path, place: str
) -> None:
    with (
        hold_alone(tmp_path / place, "a test is at work"),
        pytest.raises(InputError, match=f"{place}: another distillation is at work there"),
    ):
        distil(tmp_path / "lcm", base, pictures)


def test_a_work_folder_that_would_be_replaced_is_refused(base: BaseFiles, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lies in .*lcm, which is replaced"):
        distil(tmp_path / "lcm", base, pictures, work=tmp_path / "lcm" / "work")
