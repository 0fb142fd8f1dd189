"""The loop against an oracle written from the equations, on pictures whose exact denoiser is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dreammix_trt.core.errors import NotFiniteError
from dreammix_trt.core.noise import SeededNoise
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Step, make_schedule
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.engine.canvas.frames import Canvas, from_decoded
from dreammix_trt.engine.host.denoiser import Conditioning, EngineDenoiser, FakeDenoiser
from dreammix_trt.engine.host.painter import HostPainter, Sitting
from dreammix_trt.engine.host.sampling import StageInputs, Taken
from dreammix_trt.engine.host.texts import Text
from tests.engine.oracle import sample_exactly
from tests.support.host import paint_all, sample

F32 = npt.NDArray[np.float32]
SHAPES = {"lcg": (12, 10), "gch": (9, 14)}
BOUND = 1e-5  # of the largest value: the loop's single precision against double


def make_stage(name: str, count: int, guided: bool) -> StageInputs:
    """Random backgrounds and masks, all of a stage's pictures alike in size."""
    rng = np.random.default_rng(len(name) + ord(name[0]))
    h, w = SHAPES[name]
    rows = count * (2 if guided else 1)
    told = Conditioning(
        np.zeros((rows, 77, 2), np.float32),
        np.zeros((rows, 2), np.float32),
        ((8 * h, 8 * w),) * count,
        64,
        np.zeros((count, 2, h, w), np.float32),
        {},
    )
    background = rng.standard_normal((count, 4, h, w)).astype(np.float32)
    mask = (rng.random((count, 1, h, w)) < 0.6).astype(np.float32)
    return StageInputs(np.zeros_like(background), background, mask, told)


def resize(x0: F32) -> F32:
    """A stand-in for decode, paste, encode: linear, and into the global stage's shape."""
    h, w = SHAPES["gch"]
    return 0.5 * np.pad(x0, ((0, 0), (0, 0), (0, 5), (0, 8)))[:, :, :h, :w].astype(np.float32) + np.float32(0.1)


def run_loop(request: Request, denoiser: Any, seeds: Sequence[int] = (3,)) -> list[Taken]:
    schedule, noises = make_schedule(request), [SeededNoise(seed) for seed in seeds]
    stages = {name: make_stage(name, len(seeds), request.guided) for name in SHAPES}

    def draw(label: str, like: F32) -> F32:
        return np.concatenate([noise.draw(label, (1, *like.shape[1:]), 0) for noise in noises])

    def hand_over(step: Step, x0: F32) -> StageInputs:
        to = stages["gch"]
        latent = resize(x0) + np.float32(step.sigma) * draw("renoise_switch", to.background)
        return StageInputs(latent, to.background, to.mask, to.conditioning)

    first = stages[schedule[0].stage]
    latent = first.background + np.float32(schedule.start_scale) * draw("init_noise", first.background)
    begin = StageInputs(latent, first.background, first.mask, first.conditioning)
    return list(sample(schedule, denoiser, noises, begin, hand_over))


def predict_steps(request: Request, seeds: Sequence[int] = (3,)) -> list[tuple[Any, Any, Any]]:
    """The same by the oracle; the denoiser's formula is written out again."""
    stages = {name: make_stage(name, len(seeds), request.guided) for name in SHAPES}
    at = ["gch" if request.local_steps == 0 else "lcg"]

    def predict(x: Any, sigma: float, stage: str) -> tuple[Any, Any]:
        at[0] = stage
        return sigma * x / (sigma**2 + 0.25), sigma * (x - 0.5) / (sigma**2 + 0.25)

    def draw(label: str, step: int) -> Any:
        shape = SHAPES["gch" if label == "renoise_switch" or step >= request.local_steps else "lcg"]
        if label == "blend_noise" and request.blend_noise == "fixed":
            shape = (seen[0].shape[2], seen[0].shape[3])
        draws = [SeededNoise(seed).draw(label, (1, 4, *shape), step) for seed in seeds]
        return np.concatenate(draws).astype(np.float64)

    seen = [np.zeros((1, 4, *SHAPES[at[0]]))]

    def hand_over(x0: Any) -> Any:
        seen[0] = np.zeros((1, 4, *SHAPES["gch"]))
        return resize(x0).astype(np.float64)

    return sample_exactly(
        request.steps,
        request.local_steps,
        {n: s.background.astype(np.float64) for n, s in stages.items()},
        {n: s.mask.astype(np.float64) for n, s in stages.items()},
        hand_over,
        predict,
        draw,
        guidance=request.guidance_scale,
        rescale=request.guidance_rescale,
        sharpness=request.sharpness,
        fixed=request.blend_noise == "fixed",
        blends=request.blend_output,
    )


def find_largest_error(request: Request, seeds: Sequence[int] = (3,)) -> float:
    ours, truth = run_loop(request, FakeDenoiser(), seeds), predict_steps(request, seeds)
    assert len(ours) == len(truth) == request.steps
    errors = [
        np.abs(got - wanted).max() / np.abs(wanted).max()
        for taken, row in zip(ours, truth, strict=True)
        for got, wanted in zip((taken.x_in, taken.x0, taken.x), row, strict=True)
    ]
    return float(max(errors))


PLAIN = Request("", num_inference_steps=9, sharpness=0)


@pytest.mark.parametrize(
    "request_",
    [
        PLAIN,
        PLAIN.replace(sharpness=100),
        PLAIN.replace(guidance_scale=1),
        PLAIN.replace(guidance_scale=0.3, sharpness=100),
        PLAIN.replace(guidance_rescale=0.7),
        PLAIN.replace(blend_output=True),
        PLAIN.replace(blend_noise="fixed"),
        PLAIN.replace(lcg_steps=9),
        PLAIN.replace(lcg_steps=0),
        PLAIN.replace(lcg_steps=1),
        PLAIN.replace(num_inference_steps=2),
        PLAIN.replace(num_inference_steps=1, lcg_steps=1),
        PLAIN.replace(sharpness=60, blend_output=True, guidance_rescale=0.2, lcg_steps=4),
    ],
    ids=lambda r: ",".join(f"{k}={v}" for k, v in vars(r).items() if v != getattr(PLAIN, k)) or "plain",
)
@pytest.mark.parametrize("seeds", [(3,), (3, 1 << 40)], ids=["one picture", "two pictures"])
def test_every_step_follows_the_equations(request_: Request, seeds: tuple[int, ...]) -> None:
    assert find_largest_error(request_, seeds) < BOUND


def take_few_steps(request: Request) -> list[tuple[Any, Any]]:
    """(x0, x) of every step of one picture without guidance, blended and handed over as in `run_loop`.

    From the papers' equations: Euler's dx/dsigma = eps, or a consistency function of variance-preserving latents.
    """
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.append(np.cumprod(1 - beta), 1.0)
    n, local, lcm = request.steps, request.local_steps, request.sampler == "lcm"
    times = [999 - 20 * int(i * 50 / n) for i in range(n)] if lcm else [int(1000 * (1 - i / n)) - 1 for i in range(n)]
    levels = [float(np.sqrt(1 / kept[t] - 1)) for t in [*times, 1000]]
    stages = {name: make_stage(name, 1, False) for name in SHAPES}
    at, told = stages["lcg" if local else "gch"], []

    def draw(label: str, step: int = 0) -> Any:
        return SeededNoise(3).draw(label, at.background.shape, step).astype(np.float64)

    x = at.background + draw("init_noise") * (np.sqrt(1 + levels[0] ** 2) if lcm else levels[0])
    for i, (t, s, following) in enumerate(zip(times, levels, levels[1:], strict=False)):
        if i == local and local:
            at = stages["gch"]
            x = resize(told[-1][0].astype(np.float32)) + s * draw("renoise_switch")
        x = x * at.mask + (at.background + s * draw("blend_noise", i)) * (1 - at.mask)
        eps = s * (x - 0.5) / (s**2 + 0.25)
        x0 = x - s * eps
        if lcm:
            scaled = 10.0 * t
            preserved = x * np.sqrt(kept[t])
            x = (0.25 * preserved + scaled * np.sqrt(scaled**2 + 0.25) * x0) / (scaled**2 + 0.25)
            x = x + following * draw("solver_noise", i) if i + 1 < n else x
        else:
            x = x + (following - s) * eps
        told.append((x0, x))
    return told


@pytest.mark.parametrize("sampler", ["euler", "lcm"])
@pytest.mark.parametrize(("steps", "local"), [(1, 1), (1, 0), (2, 1), (4, 3), (4, 0), (8, 5), (8, 8)])
def test_few_step_samplers_follow_their_equations(sampler: Any, steps: int, local: int) -> None:
    request = PLAIN.replace(sampler=sampler, num_inference_steps=steps, lcg_steps=local, guidance_scale=1)
    ours, truth = run_loop(request, FakeDenoiser()), take_few_steps(request)
    for taken, row in zip(ours, truth, strict=True):
        for got, wanted in zip((taken.x0, taken.x), row, strict=True):
            assert np.abs(got - wanted).max() < BOUND * np.abs(wanted).max()


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "euler"])
@pytest.mark.parametrize("blends", [False, True])
def test_the_last_step_returns_the_prediction_to_the_bit(sampler: Any, blends: bool) -> None:
    last = run_loop(PLAIN.replace(sampler=sampler, blend_output=blends), FakeDenoiser())[-1]
    np.testing.assert_array_equal(last.x, last.x0)


WRONG = [{"guidance_scale": 4.01}, {"sharpness": 1}, {"lcg_steps": 5}, {"blend_output": True}]


@pytest.mark.parametrize("wrong", WRONG)
def test_the_oracle_sees_a_small_change(wrong: dict[str, Any]) -> None:
    ours, truth = run_loop(PLAIN, FakeDenoiser()), predict_steps(PLAIN.replace(**wrong))
    shapes = [taken.x0.shape == row[1].shape for taken, row in zip(ours, truth, strict=True)]
    assert not all(shapes) or max(np.abs(t.x0 - r[1]).max() for t, r in zip(ours, truth, strict=True)) > 10 * BOUND


def test_a_picture_of_a_batch_equals_it_alone() -> None:
    request = PLAIN.replace(sharpness=5)
    stage = make_stage("lcg", 2, True)
    told = stage.conditioning
    alone = Conditioning(told.text[:2], told.pooled[:2], told.sizes[:1], 64, told.feature[:1], {})
    schedule = make_schedule(request.replace(lcg_steps=9))
    both = list(sample(schedule, FakeDenoiser(), [SeededNoise(3), SeededNoise(4)], stage, _never))
    first = StageInputs(stage.latent[:1], stage.background[:1], stage.mask[:1], alone)
    one = list(sample(schedule, FakeDenoiser(), [SeededNoise(3)], first, _never))
    for pair, single in zip(both, one, strict=True):
        np.testing.assert_array_equal(pair.x0[:1], single.x0)


def test_leaving_the_iteration_stops_the_work() -> None:
    fake = FakeDenoiser()
    steps = sample(make_schedule(PLAIN), fake, [SeededNoise(0)], make_stage("lcg", 1, True), _never)
    next(steps), next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert [step.index for step in fake.steps] == [0, 1]


@pytest.mark.parametrize(("scale", "rows"), [(4.0, 4), (1.0, 2), (0.0, 2)])
def test_without_guidance_there_are_no_negative_rows(scale: float, rows: int) -> None:
    seen: list[int] = []

    def count_rows(latents: F32, step: Step, conditioning: Conditioning) -> F32:
        seen.append(len(latents))
        return np.zeros_like(latents)

    run_loop(PLAIN.replace(guidance_scale=scale), count_rows, (1, 2))
    assert set(seen) == {rows}


def test_numbers_that_are_none_are_refused_with_the_step() -> None:
    def spoil_step(latents: F32, step: Step, conditioning: Conditioning) -> F32:
        return np.full_like(latents, np.nan if step.index == 3 else 0)

    with pytest.raises(NotFiniteError, match="step 3"):
        run_loop(PLAIN, spoil_step)


class LinearNetworks:
    """A VAE that averages 8 x 8 blocks and repeats them, a head that shows what it got, and UNets that note it."""

    def __init__(self, *absent: str) -> None:
        self.absent = absent
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def __contains__(self, name: str) -> bool:
        named = {"vae_encoder", "vae_decoder", "inpaint_head", "unet_kv", "unet", "unet_raw_kv", "unet_raw"}
        return name in named - set(self.absent)

    def slots(self, name: str) -> tuple[Any, ...]:
        return ()

    def weights(self, name: str) -> dict[str, Any]:
        return {}

    def run(self, name: str, **arrays: Any) -> dict[str, F32]:
        assert name in self
        if name.endswith("_kv"):
            return {"a.key": arrays["encoder_hidden_states"]}
        if name.startswith("unet"):
            self.seen.append((name, arrays))
            return {"eps": np.zeros_like(arrays["sample"])}
        if name == "inpaint_head":
            return {"feature": np.repeat(arrays["masked_latent"], 2, 1)}
        if name == "vae_decoder":
            return {"image": np.repeat(np.repeat(arrays["latent"][:, :3], 8, 2), 8, 3)}
        n, c, h, w = arrays["image"].shape
        mean = arrays["image"].reshape(n, c, h // 8, 8, w // 8, 8).mean((3, 5))
        mean = np.concatenate([mean, mean[:, :1]], 1)
        return {"mean": mean, "std": np.full_like(mean, 0.01)}


def test_a_picture_through_both_stages() -> None:
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (48, 64, 3), np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    mask[18:34, 24:42] = 255
    request = PLAIN.replace(sharpness=40, soft_blending=True)
    facts, networks = BaseFacts(native_side=64, divisor=8, scaling_factor=0.5, feature_channels=8), LinearNetworks()
    canvas = Canvas.of(image, mask, native=64, divisor=8)
    texts = {name: Text(np.zeros((2, 77, 2), np.float32), np.zeros((2, 2), np.float32)) for name in SHAPES}
    schedule, noise = make_schedule(request), SeededNoise(9)
    sitting = Sitting(canvas, request, schedule, texts, nothing, noise)
    ours, finished = paint_all(HostPainter(sitting, networks, facts, FakeDenoiser()))

    def encode(picture: F32) -> Any:
        return 0.5 * networks.run("vae_encoder", image=picture)["mean"].astype(np.float64)

    local, whole = canvas.first_frame(request.lcg_field), canvas.global_frame(request.gch_field)

    def hand_over(x0: Any) -> Any:
        decoded = from_decoded(networks.run("vae_decoder", latent=x0.astype(np.float32) / 0.5)["image"])
        pasted = canvas.paste(local, decoded, soft=True)
        return encode(whole.network_input(canvas.crop(pasted, whole)))

    def draw(label: str, step: int) -> Any:
        frame = whole if label == "renoise_switch" or step >= request.local_steps else local
        return noise.draw(label, (1, 4, *frame.latent_size), step).astype(np.float64)

    truth = sample_exactly(
        request.steps,
        request.local_steps,
        {"lcg": encode(local.background), "gch": encode(whole.background)},
        {"lcg": local.latent_mask, "gch": whole.latent_mask},
        hand_over,
        lambda x, sigma, _: (sigma * x / (sigma**2 + 0.25), sigma * (x - 0.5) / (sigma**2 + 0.25)),
        draw,
        sharpness=40.0,
    )
    for taken, (x_in, x0, x) in zip(ours, truth, strict=True):
        for got, wanted in ((taken.x_in, x_in), (taken.x0, x0), (taken.x, x)):
            assert np.abs(got - wanted).max() < BOUND * np.abs(wanted).max()
    assert finished.shape == image.shape
    np.testing.assert_array_equal(finished[canvas.feather == 0], image[canvas.feather == 0])
    assert (finished != image).any()


def nothing(network: str) -> dict[str, Any]:
    """The weights that nobody changes."""
    return {}


def make_painter(networks: LinearNetworks, request: Request) -> HostPainter:
    """A picture whose texts have as many rows as the request's guidance takes."""
    image, mask = np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    mask[18:34, 24:42] = 255
    facts = BaseFacts(native_side=64, divisor=8, scaling_factor=0.5, feature_channels=8)
    rows = 2 if request.guided else 1
    texts = {name: Text(np.zeros((rows, 77, 2), np.float32), np.zeros((rows, 2), np.float32)) for name in SHAPES}
    canvas = Canvas.of(image, mask, native=64, divisor=8)
    schedule = make_schedule(request, raw_unet="unet_raw" in networks)
    sitting = Sitting(canvas, request, schedule, texts, nothing, SeededNoise(3))
    return HostPainter(sitting, networks, facts, EngineDenoiser(networks))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5])
def test_the_networks_see_one_row_a_picture_where_guidance_is_off(guidance: float) -> None:
    networks, request = LinearNetworks(), PLAIN.replace(guidance_scale=guidance, num_inference_steps=8)
    paint_all(make_painter(networks, request))
    rows = 2 if guidance > 1 else 1
    assert len(networks.seen) >= 8
    for _, arrays in networks.seen:
        by_row = ("sample", "timestep", "a.key", "text_embeds", "time_ids")
        assert {len(arrays[name]) for name in by_row} == {rows}
        assert len(arrays["inpaint_feature"]) == 1
        assert arrays["sample"].flags.c_contiguous


@pytest.mark.parametrize("absent", [("unet_raw",), ("unet_raw", "inpaint_head"), ()])
def test_a_base_without_a_raw_unet_is_patched_in_every_step(absent: tuple[str, ...]) -> None:
    networks, request = LinearNetworks(*absent), PLAIN.replace(patched_fraction=0.2)
    taken, _ = paint_all(make_painter(networks, request))
    told = {
        name: [bool(a["inpaint_feature"].any()) for each, a in networks.seen if each == name]
        for name, _ in networks.seen
    }
    if absent:
        assert {each.step.network for each in taken} == {"unet"} == set(told)
        assert set(told["unet"]) == {"inpaint_head" not in absent}
    else:
        assert {each.step.network for each in taken} == {"unet", "unet_raw"} == set(told)
        assert all(told["unet"]) and not any(told["unet_raw"])


def _never(step: Step, x0: F32) -> StageInputs:
    raise AssertionError("there is one stage only")
