"""Eq. 7 and 8 against numbers worked out by hand."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the trainer needs torch")

from dreammix_trt.core.errors import InputError  # noqa: E402
from dreammix_trt.trainer.losses import (  # noqa: E402
    loss_weights,
    regular_probability,
    reweighted_loss,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("paper", (1.5 * 4 + 0.7 * 9) / 2),  # errors 2 inside and 3 outside
        ("reference", ((1.5 * 2) ** 2 + (0.6 * 3) ** 2) / 2),  # the weights stand inside the square
    ],
)
def test_the_two_weightings(name: str, expected: float) -> None:
    prediction = torch.tensor([[[[2.0, 5.0]]]])
    target = torch.tensor([[[[0.0, 2.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]]])
    loss = reweighted_loss(prediction, target, mask, loss_weights(name))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_the_reference_is_the_mean_squared_error_of_scaled_arguments() -> None:
    dice = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 4, 5, 6, generator=dice) for _ in range(2))
    mask = (torch.rand(3, 1, 5, 6, generator=dice) > 0.5).float()
    scale = mask * 1.5 + (1 - mask) * 0.6
    expected = torch.nn.functional.mse_loss(scale * prediction, scale * target)
    assert float(reweighted_loss(prediction, target, mask, loss_weights("reference"))) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_the_mask_is_shared_by_all_channels() -> None:
    prediction, target = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    mask = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    loss = reweighted_loss(prediction, target, mask, loss_weights("paper"))
    assert float(loss) == pytest.approx((3 * 1.5 + 0.7) / 4, rel=1e-6)


def test_an_unknown_loss_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match=r"'l1'.*paper.*reference"):
        loss_weights("l1")


def test_eq_8_and_the_share_of_samples_that_replaces_its_sum() -> None:
    subject, regular, beta = 2.0, 3.0, 0.4
    combined = subject + beta * regular  # eq. 8
    share = regular_probability(beta)
    assert share == pytest.approx(0.4 / 1.4)
    drawn = (1 - share) * subject + share * regular  # expected loss of one sample
    assert drawn * (1 + beta) == pytest.approx(combined)
    assert regular_probability(0) == 0
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="beta"):
            regular_probability(bad)
