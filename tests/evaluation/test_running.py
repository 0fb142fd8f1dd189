"""One evaluation over a painter that needs no engine: resumed, refused, streamed, written, and its memory."""

from __future__ import annotations

import csv
import json
import logging
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request
from dreammix_trt.engine.result import read_request
from dreammix_trt.evaluation.metrics.choice import Weights, choose_metrics
from dreammix_trt.evaluation.metrics.metric import Metric, Sample
from dreammix_trt.evaluation.metrics.pixels import Psnr, SeamGradient, Ssim
from dreammix_trt.evaluation.pictures import Recipe
from dreammix_trt.evaluation.reading import read_protocol
from dreammix_trt.evaluation.running import evaluate
from tests.support.protocols import FakePainter, save, write_protocol


def read_rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(out: Path) -> dict[str, str]:
    """What an evaluation wrote but for what depends on when it painted."""
    rows = [
        {name: value for name, value in row.items() if name not in ("painted_seconds", "warnings")}
        for row in read_rows(out)
    ]
    summary = json.loads((out / "summary.json").read_text())
    summary["pictures"].pop("painted_now")
    return {"rows": json.dumps(rows), "summary": json.dumps(summary), "table": (out / "summary.csv").read_text()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_protocol(tmp_path / "protocol")


def test_every_picture_is_painted_measured_and_summed(folder: Path, tmp_path: Path) -> None:
    protocol, painter, out = read_protocol(folder), FakePainter(), tmp_path / "out"
    metrics = choose_metrics(protocol, Weights())
    summary = evaluate(protocol, painter, metrics, out, facts={"versions": {"here": "1"}})
    assert len(painter.painted) == len(protocol) == 8 and summary["pictures"] == {
        "measured": 8,
        "of": 8,
        "painted_now": 8,
    }
    rows = read_rows(out)
    assert [row["picture"] for row in rows] == [f"pictures/{order.name}.png" for order in protocol.orders()]
    for row, order in zip(rows, protocol.orders(), strict=True):
        request = read_request(out / row["picture"])
        assert (request.prompt, request.subject, request.seed) == (order.prompt.text, order.subject.name, order.seed)
        assert (row["substitute"], row["warnings"]) == ("blue" if row["task"] == "editing" else "", "a warning")
        with Image.open(order.scene.image) as scene, Image.open(order.scene.mask) as mask:
            sample = Sample(
                np.asarray(Image.open(out / row["picture"])), np.asarray(scene), np.asarray(mask) > 127,
                order.subject, "", "identity", {},
            )  # fmt: skip
        assert float(row["seam_gradient"]) == pytest.approx(SeamGradient().add(sample), rel=1e-5)
        assert float(row["psnr"]) == 100  # the painter leaves the surroundings alone
    seams = {
        name: [float(row["seam_gradient"]) for row in rows if row["subject"] == name and row["task"] == "editing"]
        for name in ("mug-0", "mug-1")
    }
    mean = summary["tasks"]["editing"]["seam_gradient"]
    assert mean["mean"] == pytest.approx(np.mean([np.mean(values) for values in seams.values()]), rel=1e-5)
    assert mean["low"] <= mean["mean"] <= mean["high"] and mean["pictures"] == 4
    assert summary["subjects"]["mug-1"]["editing"]["seam_gradient"]["mean"] == pytest.approx(
        np.mean(seams["mug-1"]), rel=1e-5
    )
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["run"]["protocol"] == {"name": "plain", "sha256": protocol.digest()}
    missing = {name for name, facts in summary["metrics"].items() if not facts["measured"]}
    assert missing >= {"clip_t", "clip_i", "dino", "fid", "lpips", "subject_cosine"}
    table = (out / "summary.csv").read_text()
    assert "identity,all,clip_t,,not measured,,,0" in table and "clip_t" not in rows[0]


def test_what_is_there_is_measured_and_not_painted_again(folder: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    evaluate(read_protocol(folder), FakePainter(), [Psnr(), SeamGradient()], whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate(read_protocol(folder), FakePainter(stop_at=5), [Psnr(), SeamGradient()], broken, update_every=2)
    unfinished = json.loads((broken / "summary.json").read_text())
    assert not unfinished["finished"] and unfinished["pictures"]["measured"] == 4 == len(read_rows(broken))
    again = FakePainter()
    evaluate(read_protocol(folder), again, [Psnr(), SeamGradient()], broken)
    assert len(again.painted) == 3 and again.opened[-1:] == ["mug-1"], "a subject with nothing to paint stays closed"
    assert tables(broken) == tables(whole)
    assert {row["painted_seconds"] for row in read_rows(broken)} == {"", "0.500"}


def test_pictures_of_other_settings_are_refused_or_painted_anew(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    evaluate(read_protocol(folder), FakePainter(), [Psnr()], out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != ".lock"}
    fewer = read_protocol(folder, {"num_inference_steps": 4})
    with pytest.raises(
        InputError, match=r"(?s)holds 8 pictures.*--force.*num_inference_steps was 30 and is 4.*and 3 more"
    ):
        evaluate(fewer, FakePainter(), [Psnr()], out)
    with pytest.raises(InputError, match="another engine or LoRA painted it"):
        evaluate(read_protocol(folder), FakePainter("another"), [Psnr()], out)
    assert before == {file: file.read_bytes() for file in before}
    save(folder / "scenes/room-1.png", np.full((40, 40, 3), 77, np.uint8))
    painter = FakePainter()
    with pytest.raises(InputError, match=r"holds 4 pictures(?s:.*)its scene changed"):
        evaluate(read_protocol(folder), painter, [Psnr()], out)
    evaluate(read_protocol(folder), painter, [Psnr()], out, force=True)
    assert len(painter.painted) == 4 and "4 pictures of other settings are painted anew" in caplog.text
    (out / "pictures/mug-0/room-0.identity-1.0.png").write_bytes(b"cut")
    with pytest.raises(InputError, match="does not say how it was made"):
        evaluate(read_protocol(folder), painter, [Psnr()], out)


def test_nothing_is_painted_where_something_cannot_be(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    painter, out = FakePainter(known=("mug-0",)), tmp_path / "out"
    with pytest.raises(InputError, match=r"protocol: subjects\.mug-1: is not here"):
        evaluate(read_protocol(folder), painter, [Psnr()], out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other files \(no run\.json"):
        evaluate(read_protocol(folder), FakePainter(), [Psnr()], tmp_path / "mine")
    with pytest.raises(InputError, match=r"has no mug-0/room-0\.identity-1\.0\.png"):
        evaluate(read_protocol(folder), FakePainter(), [Psnr()], out, references=tmp_path)
    assert not painter.painted and not out.exists()
    text = (folder / "protocol.json").read_text().replace("a red sks", "a red skz")
    (folder / "protocol.json").write_text(text)
    evaluate(read_protocol(folder), FakePainter(), [Psnr()], out)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [f"subjects.mug-{k}, editing-1: 'skz' is no word" for k in range(2)], "once a prompt"


def test_a_second_run_does_not_write_into_the_first(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Intruder(FakePainter):
        def paint(self, scene: Any, request: Any) -> Any:
            with pytest.raises(InputError, match="another evaluation is writing there"):
                evaluate(read_protocol(folder), FakePainter(), [Psnr()], out)
            return super().paint(scene, request)

    evaluate(read_protocol(write_protocol(tmp_path / "one", subjects=1, scenes=1)), Intruder(), [Psnr()], out)


def test_pictures_of_another_protocol_are_named_and_left(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    evaluate(read_protocol(folder), FakePainter(), [Psnr()], out)
    record = json.loads((folder / "protocol.json").read_text())
    del record["subjects"]["mug-1"]
    (folder / "protocol.json").write_text(json.dumps(record))
    summary = evaluate(read_protocol(folder), FakePainter(), [Psnr()], out)
    assert summary["pictures"]["measured"] == 4
    assert "4 pictures are not of this protocol, and are left alone: mug-1/" in caplog.text
    assert len(list((out / "pictures/mug-1").iterdir())) == 4


def test_two_runs_are_compared_picture_by_picture(folder: Path, tmp_path: Path) -> None:
    evaluate(read_protocol(folder), FakePainter("one"), [Psnr()], tmp_path / "one")
    twin = evaluate(
        read_protocol(folder), FakePainter("one"), [Psnr()], tmp_path / "two", references=tmp_path / "one/pictures"
    )
    assert twin["tasks"]["identity"]["psnr"]["mean"] == 100
    other = evaluate(
        read_protocol(folder),
        FakePainter("other"),
        [Psnr(), Ssim()],
        tmp_path / "three",
        references=tmp_path / "one/pictures",
    )
    assert other["tasks"]["identity"]["psnr"]["mean"] < 30
    save(tmp_path / "one/pictures/mug-1/room-1.editing-1.0.png", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(InputError, match=r"mug-1/room-1\.editing-1\.0\.png: is 9x8, but its scene 40x40"):
        evaluate(
            read_protocol(folder), FakePainter(), [Psnr()], tmp_path / "four", references=tmp_path / "one/pictures"
        )


class Links(HTMLParser):
    """Every place a page leads to, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.places += [value for name, value in attrs if name in ("href", "src") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_picture_by_a_small_one_and_links_what_is_there(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "protocol.json").read_text())
    record["subjects"]["mug-0"]["identity"] = ['a <b>bold</b> sks mug & "more"']
    (folder / "protocol.json").write_text(json.dumps(record))
    out = tmp_path / "out"
    evaluate(read_protocol(folder), FakePainter(), choose_metrics(read_protocol(folder), Weights()), out)
    page = (out / "index.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    files = [unquote(place) for place in links.places if not place.startswith("#")]
    assert all((out / place).is_file() and not place.startswith(("/", "http", "data")) for place in files)
    for order in read_protocol(folder).orders():
        assert {f"pictures/{order.name}.png", f"thumbnails/{order.name}.jpg"} <= set(files)
    assert {"thumbnails/mug-0/photograph-1.jpg", "thumbnails/scenes/room-1.jpg"} <= set(files)
    assert 'a <b>bold</b> sks mug & "more"' in links.text and "<b>" not in page
    assert "not measured: give CLIP's weights: --clip FOLDER" in links.text
    assert re.search(r"seam gradient \[levels\] → 0", links.text)


def test_memory_does_not_grow_with_pictures(tmp_path: Path) -> None:
    """The peak of 80 pictures is that of 20, but for the bookkeeping of file names."""
    peaks = []
    for count in (20, 80):
        protocol = read_protocol(write_protocol(tmp_path / f"{count}", subjects=1, scenes=1, seeds=count // 2, side=64))
        assert len(protocol) == count
        tracemalloc.start()
        evaluate(protocol, Forgetful(), [Psnr(), SeamGradient(), Counted()], tmp_path / f"out-{count}", update_every=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 60 * 1000, f"{peaks}: 60 pictures of 12 KB"


class Forgetful(FakePainter):
    """Keeps nothing of what it paints."""

    def paint(self, scene: Any, request: Any) -> Any:
        self.painted = []
        return super().paint(scene, request)


class Counted(Metric):
    """A metric that a later feature brings."""

    name, better, about = "counted", "zero", "the number of pictures of a task"

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def add(self, sample: Sample) -> float | None:
        self.seen[sample.task] = self.seen.get(sample.task, 0) + 1
        return None

    def result(self, task: str) -> float | None:
        return self.seen.get(task)


def test_a_metric_of_all_pictures_together_stands_in_the_summary(folder: Path, tmp_path: Path) -> None:
    summary = evaluate(read_protocol(folder), FakePainter(), [Counted()], tmp_path / "out")
    assert summary["tasks"]["identity"]["counted"] == {"mean": 4, "pictures": 4}


def test_a_picture_of_an_older_version_is_the_same_where_new_fields_have_their_defaults() -> None:
    recipe = Recipe(Request("a sks mug"), "engine", "1", "2")
    made = json.loads(recipe.to_json())
    assert recipe.explain_change(made) == ""
    del made["request"]["feather"]
    assert recipe.explain_change(made) == ""
    assert (
        Recipe(Request("a sks mug", feather=3), "engine", "1", "2").explain_change(made) == "feather was None and is 3"
    )
    for strange in (None, {}, {"request": 3}, {"request": {**made["request"], "schema": 99}}):
        assert recipe.explain_change(strange) == "it does not say how it was made"
