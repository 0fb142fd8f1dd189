"""The decoder: what it may depend on, where the known pixels enter, and that the rest is the VAE's decoder."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch
from diffusers import AutoencoderKL

from dreammix_trt.core.asuka import AsukaConfig, DecoderConfig
from dreammix_trt.core.torch_modules.asuka_decoder import AsukaDecoder, _shrink

SMALL = DecoderConfig(block_out_channels=(8, 12, 16, 20), layers_per_block=1, norm_num_groups=2)


@pytest.fixture
def decoder() -> AsukaDecoder:
    torch.manual_seed(0)
    return AsukaDecoder(SMALL).eval().requires_grad_(False)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_without_a_hole_the_latent_has_no_effect(decoder: AsukaDecoder) -> None:
    image, mask = draw(2, 3, 32, 48), torch.zeros(2, 1, 32, 48)
    assert torch.equal(decoder(draw(2, 4, 4, 6, seed=1), image, mask), decoder(draw(2, 4, 4, 6, seed=2), image, mask))


def test_where_all_is_hole_the_picture_has_no_effect(decoder: AsukaDecoder) -> None:
    latent, mask = draw(2, 4, 4, 6), torch.ones(2, 1, 32, 48)
    one, other = (decoder(latent, draw(2, 3, 32, 48, seed=seed), mask) for seed in (1, 2))
    assert torch.equal(one, other)


def test_pixels_of_the_hole_have_no_effect(decoder: AsukaDecoder) -> None:
    latent, image, mask = draw(1, 4, 4, 4), draw(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 5:20, 9:13] = 1
    other = torch.where(mask > 0, draw(1, 3, 32, 32, seed=3), image)
    assert torch.equal(decoder(latent, image, mask), decoder(latent, other, mask))


def test_where_all_is_hole_it_is_the_vaes_decoder(decoder: AsukaDecoder) -> None:
    """Parameters have the names of the VAE's, so these can start it."""
    vae = AutoencoderKL(
        **{"block_out_channels": (8, 12, 16, 20), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4},
        up_block_types=("UpDecoderBlock2D",) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
    ).eval()
    own = decoder.state_dict()
    given = {name: value for name, value in vae.state_dict().items() if name in own}
    assert {name for name in own if name not in given} == {
        f"condition.layers.{number}.{part}" for number in range(5) for part in ("weight", "bias")
    }
    decoder.load_state_dict(given, strict=False)
    latent = draw(1, 4, 4, 4)
    with torch.no_grad():
        expected = vae.decode(latent).sample
        found = decoder(latent, draw(1, 3, 32, 32), torch.ones(1, 1, 32, 32))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_known_pixels_enter_at_five_places(decoder: AsukaDecoder) -> None:
    """Each replaces the stream at its own resolution, before the block that follows."""
    seen: list[tuple[torch.Size, torch.Size]] = []
    for place in decoder.injections:
        place.register_forward_pre_hook(lambda _module, inputs: seen.append((inputs[0].shape, inputs[2].shape)))
    mask = torch.zeros(1, 1, 64, 32)
    mask[..., 17, 9] = 1
    decoder(draw(1, 4, 8, 4), draw(1, 3, 64, 32), mask)
    sides = [tuple(shape[1:]) for shape, _ in seen]
    assert sides == [(20, 8, 4), (20, 16, 8), (16, 32, 16), (12, 64, 32), (8, 64, 32)]
    assert all(shape[2:] == hole[2:] for shape, hole in seen)


def test_a_touched_cell_is_of_the_hole() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 17, 9] = mask[..., 0, 31] = 1
    for number, found in enumerate(_shrink(mask)):
        area = torch.nn.functional.interpolate(mask, scale_factor=0.5**number, mode="area")
        assert torch.equal(found, (area > 0).float())


def test_the_condition_enters_before_its_activation(decoder: AsukaDecoder) -> None:
    found = decoder.condition(draw(1, 3, 32, 32), torch.zeros(1, 1, 32, 32))
    sides = [tuple(each.shape[1:]) for each in found]
    assert sides == [(8, 32, 32), (12, 32, 32), (16, 16, 16), (20, 8, 8), (20, 4, 4)]
    assert all((each < 0).any() for each in found)
    torch.testing.assert_close(found[1], decoder.condition.layers[1](found[0].relu()))


def test_widths_are_sdxls() -> None:
    with torch.device("meta"):
        made = AsukaDecoder(AsukaConfig().decoder)
    shapes = [tuple(layer.weight.shape) for layer in made.condition.layers]
    assert shapes == [(128, 4, 3, 3), (256, 128, 3, 3), (512, 256, 4, 4), (512, 512, 4, 4), (512, 512, 4, 4)]
