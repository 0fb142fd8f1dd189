"""train.html: one page that stands alone, with the numbers it was given."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.train_report import plot_losses, sheet_of, write_report
from dreammix_trt.train_validation import Painted
from dreammix_trt.trainer.photographs import PhotographFile


@dataclass(frozen=True)
class Record:
    token: str
    class_name: str
    learning_rate: float
    settings: dict[str, int]


RECORD = Record("sks", "<mug>", 1e-4, {"rank": 4})


def painted(folder: Path, step: int, colour: tuple[int, int, int], prompt: str = "a sks mug") -> Painted:
    file = folder / f"{step}-{prompt[-3:]}.png"
    Image.new("RGB", (64, 64), colour).save(file)
    return Painted(step, prompt, "room1", file)


def points_of(svg: str, number: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    lines = re.findall(r'<polyline points="([^"]*)"', svg)
    return np.array([[float(n) for n in pair.split(",")] for pair in lines[number].split()])


def test_the_page_stands_alone_and_says_everything(tmp_path: Path) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    Image.new("RGB", (64, 64), (0, 0, 200)).save(tmp_path / "photo.png")
    photograph = PhotographFile(tmp_path / "photo.png", tmp_path / "mask.png")
    validations = [painted(tmp_path, 10, (200, 0, 0)), painted(tmp_path, 20, (0, 200, 0))]
    page = write_report(
        tmp_path / "out", RECORD, [0.4, 0.2], validations, photographs=[photograph], plan=["UNet  4.8 GiB"]
    )
    assert page == tmp_path / "out" / "train.html"
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    for words in ("sks &lt;mug&gt;", "0.0001", "{&quot;rank&quot;: 4}", "UNet  4.8 GiB", "<svg", "2 steps"):
        assert words in text
    sheets = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB"))
        for each in re.findall(r"base64,([^\"]+)", text)
    ]
    assert len(sheets) == 2, "validation pictures and photographs"
    reds = (np.abs(sheets[0].astype(int) - [200, 0, 0]).sum(-1) < 9).any(1).nonzero()[0]
    greens = (np.abs(sheets[0].astype(int) - [0, 200, 0]).sum(-1) < 9).any(1).nonzero()[0]
    assert reds.max() < greens.min(), "later steps stand below"
    veiled = (np.abs(sheets[1].astype(int) - [89, 0, 172]).sum(-1) < 12).sum()
    plain = (np.abs(sheets[1].astype(int) - [0, 0, 200]).sum(-1) < 9).sum()
    assert 0.2 < veiled / (veiled + plain) < 0.3, "the mask's quarter is veiled"


def test_pictures_of_a_step_stand_in_a_row(tmp_path: Path) -> None:
    two = [painted(tmp_path, 5, (9, 9, 9), prompt) for prompt in ("a sks mug", "a red sks mag")]
    one = sheet_of(two[:1])
    assert sheet_of(two).width > one.width


def test_the_curve_is_where_the_losses_are() -> None:
    losses = [1.0] * 50 + [0.5] * 50
    svg = plot_losses({"all": losses})
    raw, smooth = points_of(svg, 0), points_of(svg, 1)
    assert len(raw) == len(smooth) == 100
    floor = 284
    assert (floor - raw[0, 1]) / (floor - raw[-1, 1]) == pytest.approx(2, rel=1e-3)
    assert (np.diff(raw[:, 0]) > 0).all()
    assert smooth[0, 1] == raw[0, 1], "it begins where the losses do"
    assert raw[50, 1] > smooth[50, 1] > raw[49, 1], "and follows them slowly"


def test_long_curves_are_thinned_and_gaps_left_out() -> None:
    losses = np.linspace(2, 1, 10_000)
    subject = np.where(np.arange(10_000) % 2, losses, np.nan)
    svg = plot_losses({"all": losses, "subject": subject, "regular": np.full(10_000, np.nan)})
    assert len(points_of(svg, 0)) <= 1200
    assert "subject, smoothed" in svg
    assert "nan" not in svg
    assert "No loss is known" in plot_losses({"all": [float("nan")]})


def test_a_report_without_steps_or_pictures(tmp_path: Path) -> None:
    text = write_report(tmp_path, {"token": "sks", "class_name": "dog"}, []).read_text(encoding="utf-8")
    assert "0 steps" in text
    assert "img" not in text.partition("<body>")[2]
