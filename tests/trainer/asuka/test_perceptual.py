"""The perceptual terms of the decoder's loss: slopes by hand, LPIPS with small weights in VGG-16's form."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the trainer needs its extra")

import torch

from dreammix_trt.core import lpips
from dreammix_trt.core.errors import FileFormatError, InputError, MissingExtraError
from dreammix_trt.trainer.asuka import perceptual
from dreammix_trt.trainer.asuka.perceptual import VggDistance, slope_distance

WIDTHS = ((2, 2), (3, 3), (3, 3, 3), (4, 4, 4), (4, 4, 4))
NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's, of the convolutions


def test_slopes_by_hand() -> None:
    """An error of 1 in the corner pixel: a slope each way at 8 x 8, of a quarter at 4 x 4, of a sixteenth at 2 x 2."""
    found, wanted = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    found[..., 0, 0] = 1.0
    assert slope_distance(wanted, wanted) == 0
    by_hand = (2 / 56 + 2 * 0.25 / 12 + 2 * 0.0625 / 2) / 3
    assert float(slope_distance(found, wanted)) == pytest.approx(by_hand)


def test_a_plain_shift_costs_nothing_and_one_behind_an_edge_does() -> None:
    flat, edge = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 0.5
    assert float(slope_distance(flat + 0.3, flat)) == pytest.approx(0, abs=1e-6)
    assert float(slope_distance(edge, flat)) > 0.02


def write_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(perceptual, "_WIDTHS", WIDTHS)
    dice, state, source = torch.Generator().manual_seed(0), {}, 3
    for number, width in zip(NUMBERS, (width for stage in WIDTHS for width in stage), strict=True):
        state[f"features.{number}.weight"] = torch.randn(width, source, 3, 3, generator=dice) * 0.3
        state[f"features.{number}.bias"] = torch.randn(width, generator=dice) * 0.1
        source = width
    state["classifier.0.weight"] = torch.zeros(2, 2)
    torch.save(state, folder / "vgg16.pth")
    heads = {f"lin{k}.model.1.weight": torch.rand(1, stage[-1], 1, 1, generator=dice) for k, stage in enumerate(WIDTHS)}
    torch.save(heads, folder / "heads.pth")
    return folder / "vgg16.pth", folder / "heads.pth"


def test_lpips_is_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, heads = write_weights(tmp_path, monkeypatch)
    distance, state, lin = VggDistance(file, heads), torch.load(file), torch.load(heads)
    one, other = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(3)).mul(2).sub(1).unbind(0)

    def features(x: torch.Tensor) -> list[torch.Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, found = (x - shift[:, None, None]) / scale[:, None, None], []
        for number in range(30):
            if f"features.{number}.weight" in state:
                weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
                x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, padding=1))
            elif number in (4, 9, 16, 23):
                x = torch.nn.functional.max_pool2d(x, 2)
            if number in (3, 8, 15, 22, 29):
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt())
        return found

    wanted = sum(
        ((a - b).square() * lin[f"lin{k}.model.1.weight"]).sum(1).mean()
        for k, (a, b) in enumerate(zip(features(one), features(other), strict=True))
    )
    torch.testing.assert_close(distance(one, other), torch.as_tensor(wanted))
    assert distance(one, one) == 0
    moving = one.clone().requires_grad_()
    distance(moving, other).backward()
    assert moving.grad is not None and not any(value.requires_grad for value in distance.parameters())


def test_the_heads_come_from_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics", reason="the heads are in it")
    heads = perceptual._read_heads(lpips.find_heads("vgg"))
    assert [len(head) for head in heads] == [64, 128, 256, 512, 512] and all(head.min() >= 0 for head in heads)
    monkeypatch.setattr(lpips, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="torchmetrics is not installed"):
        perceptual._read_heads(lpips.find_heads("vgg"))


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, heads = write_weights(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=r"none\.pth: no such file"):
        VggDistance(tmp_path / "none.pth", heads)
    state = torch.load(file)
    state["features.7.bias"] = torch.zeros(9)
    torch.save(state, file)
    with pytest.raises(FileFormatError, match=r"is not VGG-16's \(features\.7\.bias is \(9,\)\)"):
        VggDistance(file, heads)
    del state["features.7.bias"]
    torch.save(state, file)
    with pytest.raises(FileFormatError, match=r"it lacks features\.7\.bias"):
        VggDistance(file, heads)
