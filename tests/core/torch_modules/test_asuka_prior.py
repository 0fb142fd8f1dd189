"""The prior against what it must be: a masked auto-encoder that is given the visible patches alone."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from dreammix_trt.core.asuka import PriorConfig
from dreammix_trt.core.torch_modules.asuka_prior import AsukaPrior
from dreammix_trt.core.torch_modules.masked_autoencoder import denormalise, make_positions, normalise

SMALL = PriorConfig(
    **{"side": 16, "patch": 4, "width": 24, "layers": 2, "heads": 3, "decoder_width": 16, "decoder_layers": 3},
    **{"decoder_heads": 2, "feature_layer": 2, "align_width": 16, "align_layers": 2, "align_head": 8},
    **{"context_width": 20, "pooled_width": 12},
)


@pytest.fixture
def prior() -> AsukaPrior:
    torch.manual_seed(0)
    made = AsukaPrior(SMALL).eval().requires_grad_(False)
    made.mae.mask_token.normal_()
    made.mae.alpha.fill_(0.25)
    return made


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make_mask() -> torch.Tensor:
    """Two holes: the first touches patches in part, the second covers whole ones."""
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, 2:7, 5:11] = 1
    mask[1, :, 4:12, 8:16] = 1
    return mask


def test_shapes(prior: AsukaPrior, image: torch.Tensor) -> None:
    context, pooled, picture = prior(image, make_mask())
    assert (context.shape, pooled.shape, picture.shape) == ((2, 16, 20), (2, 12), (2, 3, 16, 16))


def test_hidden_keys_give_what_an_encoder_of_the_visible_patches_gives(prior: AsukaPrior, image: torch.Tensor) -> None:
    mae, mask = prior.mae, make_mask()
    known = normalise(image) * (1 - mask)
    touched = mae._mark_patches(mask)
    found = mae.encode(known, touched)
    for number in range(2):
        kept = touched[number, :, 0] == 0
        x = (mae.patch_embed(known[number : number + 1]) + mae.pos_embed)[:, kept]
        for block in mae.blocks:
            x = block(x)
        torch.testing.assert_close(found[number, kept], mae.norm(x)[0], rtol=1e-5, atol=1e-5)


def test_pixels_of_the_hole_have_no_effect(prior: AsukaPrior, image: torch.Tensor) -> None:
    mask = make_mask()
    other = torch.where(mask > 0, torch.rand_like(image) * 2 - 1, image)
    for a, b in zip(prior(image, mask), prior(other, mask), strict=True):
        assert torch.equal(a, b)


def test_partial_patches_are_seen_by_the_decoder_alone(prior: AsukaPrior, image: torch.Tensor) -> None:
    """A known pixel in a touched patch has an effect, unless alpha says that the mask token is all."""
    mask = make_mask()[:1]
    other = image[:1].clone()
    other[..., 2, 4] = 0.9  # known, in the patch of rows 0 to 3 and columns 4 to 7
    before, after = prior(image[:1], mask)[0], prior(other, mask)[0]
    assert not torch.equal(before, after)
    prior.mae.alpha.fill_(1.5)
    assert torch.equal(prior(image[:1], mask)[0], prior(other, mask)[0])


def test_a_token_is_mixed_by_alpha(prior: AsukaPrior, image: torch.Tensor) -> None:
    mae, mask = prior.mae, make_mask()[:1]
    known = normalise(image[:1]) * (1 - mask)
    touched = mae._mark_patches(mask)
    plain = torch.zeros(1, 16, 16)
    mixed = mae._add_partial(plain, known, mask, touched)[0]
    embedded = mae.decoder_patch_embed(torch.cat([known, mask], 1))[0]
    area = torch.nn.functional.avg_pool2d(mask, 4).flatten()
    for number, share in enumerate(area):
        expected = 0.75 * embedded[number] if 0 < share < 1 else torch.zeros(16)
        torch.testing.assert_close(mixed[number], expected)


def test_the_feature_is_taken_before_the_last_blocks(prior: AsukaPrior, image: torch.Tensor) -> None:
    feature, picture = prior.mae(normalise(image), make_mask())
    prior.mae.decoder_blocks[2].mlp["fc2"].bias.normal_()
    changed, drawn = prior.mae(normalise(image), make_mask())
    assert torch.equal(feature, changed) and not torch.equal(picture, drawn)


def test_nothing_visible_gives_zeros(prior: AsukaPrior, image: torch.Tensor) -> None:
    mask = torch.zeros(2, 1, 16, 16)
    mask[1, :, ::4, ::4] = 1  # one pixel in each patch
    feature, picture = prior.mae(normalise(image), mask)
    assert not feature[1].any() and not picture[1].any()
    assert feature[0].any() and picture[0].any()
    assert all(torch.isfinite(part).all() for part in prior(image, mask))


def test_pictures_are_joined_as_they_were_cut(prior: AsukaPrior, image: torch.Tensor) -> None:
    cells = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 48)
    assert torch.equal(prior.mae._join_patches(cells), image)


def test_normalise_is_imagenets() -> None:
    grey = torch.full((1, 3, 1, 1), 0.5)
    expected = [(0.75 - 0.485) / 0.229, (0.75 - 0.456) / 0.224, (0.75 - 0.406) / 0.225]
    np.testing.assert_allclose(normalise(grey).flatten().numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(denormalise(normalise(grey)), grey)


def test_positions_tell_column_and_row() -> None:
    table = make_positions(8, 3).reshape(3, 3, 8)
    np.testing.assert_allclose(table[0, 2, :4], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], rtol=1e-6)
    np.testing.assert_array_equal(table[0, 2, :4], table[2, 2, :4])
    np.testing.assert_array_equal(table[1, 0, 4:], table[1, 2, 4:])
    np.testing.assert_array_equal(table[1, 0, 4:], table[0, 1, :4])
