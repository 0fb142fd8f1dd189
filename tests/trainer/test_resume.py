"""A training that is stopped goes on to the bit; what stops it leaves the last good checkpoint."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import BuildError, FileFormatError, InputError  # noqa: E402
from dreammix_trt.core.files import hold_alone  # noqa: E402
from dreammix_trt.core.lora import FILE_NAME, read_lora  # noqa: E402
from dreammix_trt.core.tensors import map_tensors  # noqa: E402
from dreammix_trt.trainer import checkpoints, preparing, training  # noqa: E402
from dreammix_trt.trainer.lora import Hardware  # noqa: E402
from dreammix_trt.trainer.regular_folder import read_regular  # noqa: E402
from tests.support.training import TINY, train  # noqa: E402

KEPT = replace(TINY, checkpoint_every=2)
STEPS = 3


def stop_at(step: int) -> Callable[[str, float, str], None]:
    """Progress that stops the program when a step is done, before its checkpoint."""

    def update(_name: str, fraction: float, _message: str) -> None:
        if fraction >= 0.1 + 0.9 * step / STEPS - 1e-9:
            raise KeyboardInterrupt

    return update


def run(photos: Path, out: Path, base: BaseFiles, **fields: Any) -> Any:
    return train(photos, out, base, **{"steps": STEPS, "recipe": KEPT} | fields)


def stop(photos: Path, out: Path, base: BaseFiles, **fields: Any) -> Path:
    """A training stopped in its third step; returns its checkpoint, of step two."""
    with pytest.raises(KeyboardInterrupt):
        run(photos, out, base, progress=stop_at(STEPS), **fields)
    assert not out.exists()
    return out.with_name(f"{out.name}.work") / "checkpoint"


@pytest.fixture(scope="module")
def stopped(base: BaseFiles, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a stopped training; tests copy it."""
    return stop(photos, tmp_path_factory.mktemp("stopped") / "lora", base).parent


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"recipe": replace(KEPT, beta_as="loss", accumulate=2, batch=2), "hardware": Hardware(precision="float16")},
    ],
    ids=["as usual", "float16, summed, accumulated"],
)
def test_a_stopped_training_goes_on_to_the_bit(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    whole = run(photos, tmp_path / "whole", base, **fields)
    assert next((tmp_path / "whole.work").iterdir()).name.startswith("prepared-")
    checkpoint = stop(photos, tmp_path / "lora", base, **fields)
    assert json.loads((checkpoint / "checkpoint.json").read_text())["step"] == 2
    assert read_lora(checkpoint).metadata["token"] == "sks", "the LoRA so far can be built"
    monkeypatch.setattr(preparing, "_make", None)  # what was encoded is not encoded again
    resumed = run(photos, tmp_path / "lora", base, resume=True, **fields)
    assert (resumed.losses, resumed.loss) == (whole.losses, whole.loss)
    for name in (FILE_NAME, "sks_mug.safetensors"):
        assert (tmp_path / "lora" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not checkpoint.exists()


def test_a_checkpoint_holds_what_the_next_step_depends_on(
    base: BaseFiles, photos: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors, or the optimizer, left as a new training has them give another LoRA."""
    kind = checkpoints.Checkpoints
    honest = kind.restore

    def restore_all_but_factors(self: Any, learner: Any) -> Any:
        copies = {name: value.clone() for name, value in learner.tensors.items()}
        return honest(self, replace(learner, tensors=copies))

    made = []
    for name, patched in (
        ("restore", honest),
        ("restore", restore_all_but_factors),
        ("_restore_optimizer", lambda *_: None),
    ):
        shutil.copytree(stopped, tmp_path / "lora.work", dirs_exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, patched)
            run(photos, tmp_path / "lora", base, resume=True)
        made.append((tmp_path / "lora" / FILE_NAME).read_bytes())
    assert len(set(made)) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 2}, "rank is 2, and was 4"),
        ({"seed": 3}, "seed is 3, and was 0"),
        ({"learning_rate": 0.02}, r"learning rate is 0.02, and was 0.01"),
        ({"steps": 6}, "steps is 6, and was 3"),
        ({"loss": "paper"}, "loss is 'paper', and was 'reference'"),
        ({"recipe": replace(KEPT, beta=0.4)}, "beta is 0.4, and was 0.1"),
        ({"hardware": Hardware(precision="bfloat16")}, "precision is 'bfloat16', and was 'default'"),
        ({"captions": ["a red sks mug"]}, "captions is"),
    ],
)
def test_other_settings_are_refused_by_name(
    base: BaseFiles, photos: Path, stopped: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"{message}.*leave --resume"):
        run(photos, tmp_path / "lora", base, resume=True, work=stopped, **fields)


def test_other_biases_of_the_patch_are_refused_by_name(
    base: BaseFiles, photos: Path, stopped: Path, tmp_path: Path
) -> None:
    """The files are the same with and without them."""
    with pytest.raises(InputError, match="patch biases is True, and was False"):
        run(photos, tmp_path / "lora", replace(base, patch_biases=True), resume=True, work=stopped)


def test_other_photographs_are_refused_by_name(base: BaseFiles, photos: Path, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copyfile(photos / "image" / "00.png", tmp_path / "photos" / "image" / "01.png")
    with pytest.raises(InputError, match=r"photographs: 01.png is another one"):
        run(tmp_path / "photos", tmp_path / "lora", base, resume=True, work=stopped)
    (tmp_path / "photos" / "image" / "01.png").unlink()
    with pytest.raises(InputError, match=r"photographs: 01.png is missing"):
        run(tmp_path / "photos", tmp_path / "lora", base, resume=True, work=stopped)


def test_what_is_finished_stays(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "lora", list[str]()
    made = run(photos, out, base)
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in out.iterdir()}
    assert run(photos, out, base, resume=True, notice=told.append) == made
    assert before == {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in out.iterdir()}
    assert told[-1] == f"{out}: trained before, with these settings"
    for fields, difference in (({"rank": 8}, "rank is 8, and was 4"), ({"token": "ohwx"}, "token is 'ohwx'")):
        with pytest.raises(InputError, match=rf"lora holds a LoRA of other settings \({difference}.*--force"):
            run(photos, out, base, resume=True, **fields)
    with pytest.raises(InputError, match="without merged weights"):
        run(photos, out, base, resume=True, merged=True)
    other = Path(shutil.copytree(photos, tmp_path / "photos"))
    next((other / "mask").iterdir()).unlink()
    with pytest.raises(InputError, match=r"photographs: 0\d\.png is missing"):
        run(other, out, base, resume=True)
    (out / FILE_NAME).write_bytes(b"half")
    with pytest.raises(FileFormatError, match=r"lora/pytorch_lora_weights\.safetensors: not as it was trained"):
        run(photos, out, base, resume=True)
    card = json.loads((out / "subject.json").read_text())
    (out / "subject.json").write_text(json.dumps({**card, "losses": None}))
    with pytest.raises(FileFormatError, match=r"subject\.json: damaged"):
        run(photos, out, base, resume=True)


def test_there_must_be_something_to_go_on_from(
    base: BaseFiles, photos: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match=r"lora\.work.*no checkpoint to go on from"):
        run(photos, tmp_path / "lora", base, resume=True)
    shutil.copytree(stopped, tmp_path / "lora.work")
    (tmp_path / "lora.work" / "checkpoint" / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FileFormatError, match=r"state\.safetensors"):
        run(photos, tmp_path / "lora", base, resume=True)
    with caplog.at_level(logging.WARNING):
        run(photos, tmp_path / "lora", base, steps=1)
    assert "begun anew; with --resume it goes on" in caplog.text


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    honest = training.reweighted_loss
    with monkeypatch.context() as patch:
        patch.setattr(
            training, "reweighted_loss", lambda *given: honest(*given) * (float("nan") if next(calls) == 2 else 1)
        )
        with pytest.raises(
            InputError,
            match=r"nan at step 3;.*anew, without --resume, with a smaller learning rate than 0\.01; "
            r"the checkpoint of step 2 is kept in .*work",
        ):
            run(photos, tmp_path / "lora", base)
    assert not (tmp_path / "lora").exists()
    assert read_lora(tmp_path / "lora.work" / "checkpoint").rank == 4
    assert run(photos, tmp_path / "lora", base, learning_rate=0.001).steps == STEPS, "the advice can be followed"


def test_a_full_disk_keeps_the_last_checkpoint(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(photos, tmp_path / "whole", base)
    honest, calls = checkpoints.write_state, iter(range(100))

    def write(file: Path, tensors: Any) -> None:
        if next(calls) == 1:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        honest(file, tensors)

    monkeypatch.setattr(checkpoints, "write_state", write)
    often = {"recipe": replace(KEPT, checkpoint_every=1)}
    with pytest.raises(BuildError, match=r"no space left there.*checkpoint of step 1 is kept in .*work"):
        run(photos, tmp_path / "lora", base, **often)
    assert sorted(each.name.split("-")[0] for each in (tmp_path / "lora.work").iterdir()) == ["checkpoint", "prepared"]
    run(photos, tmp_path / "lora", base, resume=True, **often)
    assert (tmp_path / "lora" / FILE_NAME).read_bytes() == (tmp_path / "whole" / FILE_NAME).read_bytes()


def test_encoded_photographs_serve_the_next_training(
    base: BaseFiles, photos: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same photographs: with another rank they need not be encoded again, with another seed they must."""
    shutil.copytree(stopped, tmp_path / "work", ignore=shutil.ignore_patterns("checkpoint"))
    (kept,) = (tmp_path / "work").iterdir()
    run(photos, tmp_path / "plain", base, recipe=TINY, rank=2)
    before = kept.stat().st_mtime_ns
    run(photos, tmp_path / "lora", base, rank=2, work=tmp_path / "work")
    assert kept.stat().st_mtime_ns == before
    assert (tmp_path / "lora" / FILE_NAME).read_bytes() == (tmp_path / "plain" / FILE_NAME).read_bytes()
    kept.write_bytes(kept.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        run(photos, tmp_path / "lora", base, rank=2, work=tmp_path / "work")
    assert "encoded again" in caplog.text
    assert (tmp_path / "lora" / FILE_NAME).read_bytes() == (tmp_path / "plain" / FILE_NAME).read_bytes()
    run(photos, tmp_path / "lora", base, seed=4, work=tmp_path / "work")
    assert kept not in (tmp_path / "work").iterdir()


def test_what_is_kept_without_regular_pictures_does_not_serve_a_training_with_them(
    base: BaseFiles, photos: Path, tmp_path: Path
) -> None:
    """The folder is the same and only beta differs: from 0, where its pictures are not encoded, to 0.4."""
    place = tmp_path / "regular_mug" / "a_photo_of_a_mug"
    place.mkdir(parents=True)
    for part in ("image", "mask"):
        shutil.copyfile(photos / part / "00.png", place / f"7-{part}.png")
    regular = read_regular(place.parent)
    given: dict[str, Any] = {"regular": regular, "steps": 2}
    run(photos, tmp_path / "plain", base, recipe=replace(TINY, beta=0.4), **given)
    run(photos, tmp_path / "first", base, recipe=replace(KEPT, beta=0.0), work=tmp_path / "work", **given)
    run(photos, tmp_path / "lora", base, recipe=replace(KEPT, beta=0.4), work=tmp_path / "work", **given)
    assert (tmp_path / "lora" / FILE_NAME).read_bytes() == (tmp_path / "plain" / FILE_NAME).read_bytes()


def test_gradients_that_are_no_numbers_stop_before_the_lora_is_lost(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of such a step is finite still, and a checkpoint is due."""
    honest, calls = training.reweighted_loss, iter(range(100))

    def lose(prediction: Any, *given: Any) -> Any:
        if next(calls) == 3:
            prediction.register_hook(lambda grad: grad * float("nan"))
        return honest(prediction, *given)

    monkeypatch.setattr(training, "reweighted_loss", lose)
    with pytest.raises(InputError, match=r"norm of the gradients is nan at step 4;.*checkpoint of step 2 is kept"):
        run(photos, tmp_path / "lora", base, steps=6)
    kept = map_tensors(tmp_path / "lora.work/checkpoint" / FILE_NAME)
    assert all(np.isfinite(value).all() for value in kept.values())


@pytest.mark.parametrize(
    ("out", "work", "message"),
    [
        ("lora", "lora", "lies in .*lora, which is replaced"),
        ("lora", "lora/work", "lies in .*lora, which is replaced"),
        ("lora", "file", "file is a file"),
        ("lora", "file/work", "file is a file"),
    ],
)
def test_a_work_folder_that_would_cost_the_training_is_refused_before_it(
    base: BaseFiles, photos: Path, tmp_path: Path, out: str, work: str, message: str
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=message):
        run(photos, tmp_path / out, base, work=tmp_path / work)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_second_training_is_kept_out(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    for place in ("lora", "work"):
        with (
            hold_alone(tmp_path / place, "a test is at work"),
            pytest.raises(InputError, match=f"{place}: another training is at work there"),
        ):
            run(photos, tmp_path / "lora", base, work=tmp_path / "work")
    assert not [*tmp_path.iterdir()]
