"""The whole recipe. Every stage leaves its result in the work folder and is skipped when that is there."""

from __future__ import annotations

import json
import logging
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from dreammix_trt.trainer.micro import data, world
from dreammix_trt.trainer.micro import vae as vae_module
from dreammix_trt.trainer.micro.forms import FormLoss, train_form_reader
from dreammix_trt.trainer.micro.judge import FACTS_FILE, WEIGHTS_FILE
from dreammix_trt.trainer.micro.loop import Plan, save_atomic, train
from dreammix_trt.trainer.micro.networks import NoiseNetwork, TextEncoders, build_vae
from dreammix_trt.trainer.micro.parallel import Team, run_team
from dreammix_trt.trainer.micro.parts import PartLoss, train_part_reader
from dreammix_trt.trainer.micro.reading import teach_reading
from dreammix_trt.trainer.micro.ship import write_model
from dreammix_trt.trainer.micro.tokenizer import PromptTokenizer, save_tokenizers
from dreammix_trt.trainer.micro.unet import InpaintModel, NoiseLoss, RawModel, inpaint_loss, raw_loss
from dreammix_trt.trainer.networks import choose_precision, write_out_attention

log = logging.getLogger(__name__)


_VAE = Plan(steps=4200, limit_seconds=3600, lr=2e-3, ema=0.995, weight_decay=0.0)
_DECODER = Plan(steps=1200, limit_seconds=1200, lr=1e-3, warmup=30, ema=0.99, weight_decay=0.0)
_RAW = Plan(steps=7000, limit_seconds=10_800, lr=1.2e-3, warmup=150)
_INPAINT = Plan(steps=7000, limit_seconds=10_800, lr=9e-4, warmup=60, ema=0.998)


@dataclass(frozen=True)
class Settings:
    """All that decides the result. Plans are for two free cores: about three hours in all."""

    out: Path
    work: Path
    device: str = "cpu"
    native: int = 256
    seed: int = 0
    processes: int = 2
    scenes: int = 24_000
    batch: int = 16
    vae: Plan = _VAE
    decoder: Plan = _DECODER
    form_steps: int = 1500
    part_steps: int = 1200
    reading_steps: int = 500
    raw: Plan = _RAW
    inpaint: Plan = _INPAINT
    judge_things: int = 6000
    judge_steps: int = 5000
    scenes_to_judge: int = 208

    @property
    def precision(self) -> torch.dtype:
        """Of activations in training."""
        return choose_precision(self.device)

    def scale(self, minutes_scale: float) -> Settings:
        """The same recipe with every stage's steps and time limit multiplied."""

        def scale(plan: Plan) -> Plan:
            steps = max(2, round(plan.steps * minutes_scale))
            return replace(plan, steps=steps, limit_seconds=plan.limit_seconds * minutes_scale)

        return replace(
            self,
            vae=scale(self.vae),
            decoder=scale(self.decoder),
            raw=scale(self.raw),
            inpaint=scale(self.inpaint),
            judge_steps=max(2, round(self.judge_steps * minutes_scale)),
            form_steps=max(2, round(self.form_steps * minutes_scale)),
            part_steps=max(2, round(self.part_steps * minutes_scale)),
            reading_steps=max(2, round(self.reading_steps * minutes_scale)),
        )

    def smoke(self) -> Settings:
        """A few steps of everything, in one process: proves the plumbing, not the quality."""

        def cut(plan: Plan) -> Plan:
            return replace(plan, steps=3, limit_seconds=600.0)

        return replace(
            self,
            processes=1,
            scenes=48,
            batch=4,
            vae=cut(self.vae),
            decoder=cut(self.decoder),
            raw=cut(self.raw),
            inpaint=cut(self.inpaint),
            judge_things=40,
            judge_steps=3,
            form_steps=3,
            part_steps=3,
            reading_steps=3,
            scenes_to_judge=4,
        )


def run(settings: Settings) -> None:
    """Make the model folder ``settings.out``; resumes whatever ``settings.work`` already holds."""
    settings.work.mkdir(parents=True, exist_ok=True)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    _stage("tokenizer", settings, lambda: save_tokenizers(settings.work))
    _stage("render", settings, lambda: _render(settings))
    _stage("vae", settings, lambda: _team(settings, _train_vae, settings, cuda=True))
    _stage("decoder", settings, lambda: _team(settings, _train_decoder, settings, cuda=True))
    _stage("fold", settings, lambda: _fold(settings))
    _stage("encode", settings, lambda: _team(settings, _encode, settings))
    _stage("forms", settings, lambda: _train_form_reader(settings))
    _stage("parts", settings, lambda: _train_part_reader(settings))
    _stage("judge_views", settings, lambda: _team(settings, _render_things, settings))
    _stage("judge", settings, lambda: _train_judge(settings))
    _stage("reading", settings, lambda: _teach_reading(settings))
    _stage("raw", settings, lambda: _team(settings, _train_raw, settings, cuda=True))
    _stage("inpaint", settings, lambda: _team(settings, _train_inpaint, settings, cuda=True))
    export(settings)
    _stage("evaluate", settings, lambda: _evaluate(settings))
    export(settings)
    announce(f"finished: {settings.out}")


def announce(text: str) -> None:
    log.info("%s", text)


def _stage(name: str, settings: Settings, action: Any) -> None:
    mark = settings.work / f"{name}.done"
    if mark.exists():
        return
    announce(f"stage {name}: begins")
    start = time.monotonic()
    action()
    seconds = time.monotonic() - start
    mark.write_text(f"{seconds:.1f}\n")
    announce(f"stage {name}: {seconds:.0f} s")


def _team(settings: Settings, job: Any, *arguments: Any, cuda: bool = False) -> None:
    if cuda and settings.device != "cpu":
        run_team(job, *arguments, size=1, device=settings.device)
    else:
        run_team(job, *arguments, size=settings.processes, device="cpu")


def _render(settings: Settings) -> None:
    _team(settings, data.render_shard, settings.work, settings.native, settings.scenes, settings.seed)


# -- VAE ------------------------------------------------------------


class _Crops:
    """Random object-centred crops of the rendered scenes, half a native side wide."""

    def __init__(self, settings: Settings, team: Team, count: int) -> None:
        self._images = np.load(settings.work / "images_square.npy", "r")
        self._facts = np.load(settings.work / "facts_square.npy")
        self._seed, self._rank, self._count, self._device = settings.seed, team.rank, count, team.device
        self._side = settings.native // 2

    def draw(self, step: int) -> torch.Tensor:
        rng = np.random.default_rng([self._seed, 3, self._rank, step])
        side, full = self._side, self._images.shape[1]
        crops = np.empty((self._count, side, side, 3), np.uint8)
        for n, row in enumerate(rng.integers(min(64, len(self._images) // 2), len(self._images), self._count)):
            if rng.random() < 0.85:
                x0, y0, x1, y1 = self._facts["box"][row]
                cx, cy = rng.uniform(x0, x1), rng.uniform(y0, y1)
            else:
                cx, cy = rng.uniform(0, full, 2)
            x, y = (int(np.clip(c - side / 2, 0, full - side)) for c in (cx, cy))
            crop = self._images[row, y : y + side, x : x + side]
            crops[n] = crop[:, ::-1] if rng.random() < 0.5 else crop
        return vae_module.to_unit(crops).to(self._device)


def _train_vae(team: Team, settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    vae = build_vae(settings.native)
    vae_module.start_with_colour(vae)
    write_out_attention(vae)
    vae.to(team.device)
    crops = _Crops(settings, team, max(2, settings.batch // 2))
    torch.manual_seed(settings.seed + 1 + team.rank)

    def loss_of(step: int) -> torch.Tensor:
        images = crops.draw(step)
        posterior = vae.encode(images).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        mean, spread = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        return vae_module.reconstruction_loss(rebuilt, images) + 1e-4 * divergence

    average = train(team, "vae", vae, loss_of, settings.vae, settings.work, settings.precision)
    if team.leads:
        vae.load_state_dict(average)
        save_atomic(vae.cpu().state_dict(), settings.work / "vae.pt")


def _train_decoder(team: Team, settings: Settings) -> None:
    vae = build_vae(settings.native)
    vae.load_state_dict(torch.load(settings.work / "vae.pt", weights_only=True))
    vae.to(team.device)
    write_out_attention(vae)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    crops = _Crops(settings, team, max(2, settings.batch // 2))
    torch.manual_seed(settings.seed + 11 + team.rank)

    def loss_of(step: int) -> torch.Tensor:
        images = crops.draw(step + 1_000_000)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
            spread = latents.std((0, 2, 3), keepdim=True)
            latents = latents + 0.03 * spread * torch.randn_like(latents)  # what a diffusion model leaves behind
        return vae_module.reconstruction_loss(vae.decode(latents).sample, images)

    average = train(team, "decoder", vae, loss_of, settings.decoder, settings.work, settings.precision)
    if team.leads:
        vae.load_state_dict(average)
        save_atomic(vae.cpu().state_dict(), settings.work / "vae_decoder.pt")


def _fold(settings: Settings) -> None:
    """Unit latents, rounding to fp16, and the measured reconstruction of scenes nobody trained on."""
    native = settings.native
    vae = build_vae(native)
    vae.load_state_dict(torch.load(settings.work / "vae_decoder.pt", weights_only=True))
    images = np.load(settings.work / "images_square.npy", "r")
    mean, deviation = vae_module.fold_latent_scale(vae, vae_module.to_unit(np.asarray(images[: min(256, len(images))])))
    vae.half().float()
    with torch.no_grad():
        scenes = world.held_out_scenes(min(96, 2 * settings.scenes_to_judge), 1, native, (0.16, 0.78))
        pictures = vae_module.to_unit(np.stack([scene.image for scene, _ in scenes]))
        rebuilt = torch.cat([vae_module.decode(vae, vae_module.encode(vae, part)) for part in pictures.split(16)])
        inside = [
            vae_module.psnr(r[None, :, y0:y1, x0:x1], p[None, :, y0:y1, x0:x1])
            for r, p, (scene, _) in zip(rebuilt, pictures, scenes, strict=True)
            for x0, y0, x1, y1 in [scene.box]
        ]
        quality = {"psnr_db": vae_module.psnr(rebuilt, pictures), "psnr_object_box_db": float(np.mean(inside))}
        grey = vae_module.encode(vae, torch.zeros(1, 3, native, native))
    np.save(settings.work / "grey.npy", grey.numpy())
    save_atomic(vae.state_dict(), settings.work / "vae_final.pt")
    note = quality | {"scenes": len(scenes), "latent_mean": mean, "latent_std": deviation}
    (settings.work / "vae_quality.json").write_text(json.dumps(note))
    announce(f"VAE: {quality}")


def load_vae(settings: Settings) -> AutoencoderKL:
    vae = build_vae(settings.native)
    vae.load_state_dict(torch.load(settings.work / "vae_final.pt", weights_only=True))
    return vae.eval()


def _encode(team: Team, settings: Settings) -> None:
    data.encode_shard(team, settings.work, load_vae(settings), settings.native, settings.seed)


# -- diffusion ------------------------------------------------------------


def _teach_reading(settings: Settings) -> None:
    words = PromptTokenizer(settings.work)
    torch.manual_seed(settings.seed)
    text = RawModel(words.size, words.bos, words.eos, settings.native).text
    worst = teach_reading(text, words, settings.reading_steps, settings.seed)
    save_atomic(text.state_dict(), settings.work / "reading.pt")
    note = {"steps": settings.reading_steps, "worst_share_right": worst}
    (settings.work / "reading.json").write_text(json.dumps(note))


def _train_form_reader(settings: Settings) -> None:
    latents = data.Latents(settings.work, settings.work, settings.native, settings.seed, "cpu")
    share = train_form_reader(latents, settings.form_steps, settings.work, settings.seed)
    note = {"steps": settings.form_steps, "decals": latents.count_decals(), "share_right": share}
    (settings.work / "forms.json").write_text(json.dumps(note))


def _train_part_reader(settings: Settings) -> None:
    latents = data.Latents(settings.work, settings.work, settings.native, settings.seed, "cpu")
    shares = train_part_reader(latents, settings.part_steps, settings.work, settings.seed)
    note = {"steps": settings.part_steps, "things": latents.count_things(), "shares_right": shares}
    (settings.work / "parts.json").write_text(json.dumps(note))


def _train_raw(team: Team, settings: Settings) -> None:
    words = PromptTokenizer(settings.work)
    torch.manual_seed(settings.seed)
    model = RawModel(words.size, words.bos, words.eos, settings.native).to(team.device)
    model.text.load_state_dict(torch.load(settings.work / "reading.pt", map_location=team.device, weights_only=True))
    latents = data.Latents(settings.work, settings.work, settings.native, settings.seed, team.device)
    loss = NoiseLoss(latents, team.rank, settings.batch, outside=0.35, all_masked=0.0)
    denoiser = NoiseNetwork(model.unet)

    def keep(average: dict[str, torch.Tensor]) -> None:
        save_atomic(_round_to_half(average), settings.work / "raw.pt")
        export(settings)

    def loss_of(step: int) -> torch.Tensor:
        return raw_loss(model, loss, denoiser, step)

    average = train(team, "raw", model, loss_of, settings.raw, settings.work, settings.precision, keep)
    if team.leads:
        keep(average)


def _train_inpaint(team: Team, settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    model = InpaintModel(settings.native)
    unet_state, text = load_raw(settings)
    model.unet.load_state_dict(unet_state)
    model.to(team.device)
    text.to(team.device)
    latents = data.Latents(settings.work, settings.work, settings.native, settings.seed + 1, team.device)
    forms = FormLoss(settings.work, latents.reading, team.device)
    parts = PartLoss(settings.work, team.device)
    loss = NoiseLoss(latents, team.rank, settings.batch, outside=0.1, all_masked=0.06, forms=forms, parts=parts)
    denoiser = NoiseNetwork(model.unet)

    def keep(average: dict[str, torch.Tensor]) -> None:
        save_atomic({name: value.cpu() for name, value in average.items()}, settings.work / "inpaint.pt")
        export(settings)

    def loss_of(step: int) -> torch.Tensor:
        return inpaint_loss(model, text, loss, denoiser, step)

    average = train(team, "inpaint", model, loss_of, settings.inpaint, settings.work, settings.precision, keep)
    if team.leads:
        keep(average)


def _round_to_half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Through fp16, so that what is fine-tuned is what is shipped."""
    return {name: v.cpu().half().float() if v.is_floating_point() else v.cpu() for name, v in state.items()}


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def load_raw(settings: Settings) -> tuple[dict[str, torch.Tensor], TextEncoders]:
    """(raw UNet state, text encoders) of the work folder, both already rounded to fp16 values."""
    words = PromptTokenizer(settings.work)
    state = torch.load(settings.work / "raw.pt", map_location="cpu", weights_only=True)
    text = TextEncoders(words.size, words.bos, words.eos)
    text.load_state_dict(_part(state, "text."))
    return _part(state, "unet."), text.eval()


def export(settings: Settings) -> None:
    """Ship whatever the work folder holds now; before the fine-tune the patch is empty and the head zero."""
    unet_state, text = load_raw(settings)
    tuned, head = None, torch.zeros(unet_state["conv_in.weight"].shape[0], 5, 3, 3)
    if (settings.work / "inpaint.pt").exists():
        state = torch.load(settings.work / "inpaint.pt", map_location="cpu", weights_only=True)
        tuned, head = _part(state, "unet."), state["head.head"]
    extras = (settings.work / WEIGHTS_FILE, settings.work / FACTS_FILE)
    record = training_record(settings)
    write_model(
        settings.out, settings.work, load_vae(settings), text, unet_state, tuned, head, settings.native, record, extras
    )
    announce(f"exported ({'raw only' if tuned is None else 'with patch and head'})")


def training_record(settings: Settings) -> dict[str, Any]:
    """What was run, from the stages' own notes."""
    import diffusers
    import transformers

    notes: dict[str, Any] = {}
    for name in ("vae", "decoder", "vae_quality", "judge", "forms", "parts", "reading", "raw", "inpaint", "evaluation"):
        path = settings.work / f"{name}.json"
        if path.exists():
            notes[name] = json.loads(path.read_text())
            if "history" in notes[name]:
                notes[name]["history"] = notes[name]["history"][::10]
    return {
        "command": "python -m dreammix_trt.trainer.micro --out DIR",
        "native_size": settings.native,
        "seed": settings.seed,
        "device": settings.device,
        "processes": settings.processes,
        "scenes": settings.scenes,
        "batch": settings.batch * (settings.processes if settings.device == "cpu" else 1),
        "stage_seconds": {p.stem: float(p.read_text()) for p in sorted(settings.work.glob("*.done"))},
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        **notes,
    }


# -- judging ------------------------------------------------------------


def _render_things(team: Team, settings: Settings) -> None:
    from dreammix_trt.trainer.micro.classifier import render_things

    render_things(team, settings.work, settings.judge_things, settings.seed)


def _train_judge(settings: Settings) -> None:
    from dreammix_trt.trainer.micro.classifier import train_judge

    train_judge(settings.work, settings.judge_steps, settings.seed)


def _evaluate(settings: Settings) -> None:
    from dreammix_trt.trainer.micro.evaluate import evaluate_model

    result = evaluate_model(settings.out, settings.scenes_to_judge, settings.processes)
    (settings.work / "evaluation.json").write_text(json.dumps(result))
