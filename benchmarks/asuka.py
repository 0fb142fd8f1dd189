"""What ASUKA brings on the embedded model: things seen in holes that are to be empty, seams around them, and the cost.

Parts: `seen` paints holes of rooms in which nothing stands there, by text and by the prior; `seam` sends true pictures
through both decoders, once and five times, and `shift` darker ones; `cost` times `remove` at 1024x1024. What ASUKA does
to subjects is `ablation.py --part asuka`.

Every reading is kept in the work folder: a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from _ablation_cases import key_of
from _ablation_report import draw_sheet, spell
from _asuka_ways import BRIEF, REMOVE, WAYS, Room, Way, count_rooms, draw_room, key_of_picture
from _common import Benchmark, median_seconds, sample_place
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dreammix_trt.building import build
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.files import atomic_file, read_json, write_json
from dreammix_trt.core.seam import Networks
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from dreammix_trt.engine.canvas.frames import from_decoded, to_latent_range
from dreammix_trt.engine.directory import open_engine
from dreammix_trt.evaluation.metrics.metric import U8, Metric, Sample
from dreammix_trt.evaluation.metrics.seen import ObjectSeen
from dreammix_trt.evaluation.metrics.truth import Grad, PsnrAsuka, RingColour
from dreammix_trt.evaluation.protocol import Subject
from dreammix_trt.evaluation.statistics import Mean, bootstrap_interval
from dreammix_trt.report import mark_region
from dreammix_trt.trainer.micro.world import show_mask

Readings = dict[str, float]
TRIPS: Final = (1, 5)
SHOWN: Final = 8  # rooms of a sheet
_NOBODY: Final = Subject("", "", "", "", (), {}, (), ())


class Painter(Protocol):
    """What fills holes; in tests a fake."""

    key: str  # changes with everything that decides its pictures
    text_key: str  # with everything that decides those that no part of ASUKA touches

    def paint(self, way: Way, picture: U8, mask: NDArray[np.bool_], seed: int) -> U8: ...


class EnginePainter:
    """An engine of the embedded base with an ASUKA folder, built once in the work folder."""

    def __init__(self, folder: Path, asuka: Path | None, steps: int, threads: int) -> None:
        """asuka: folder of the networks; None: those of the embedded base."""
        files = BaseFiles.open(asuka=asuka).find_own_extras()
        if files.asuka is None:
            raise SystemExit("the embedded base has no ASUKA: give --asuka FOLDER")
        base = files.hash_contents()
        made_of = key_of(base, files.asuka.hash_files())
        self.key, self.text_key, self.engine = key_of(made_of, steps), key_of(base, steps), folder / f"engine-{made_of}"
        if not self.engine.exists():
            build(out=self.engine, asuka=asuka)
        self._steps, self._threads = steps, threads
        self._dm: DreamMix | None = None

    def paint(self, way: Way, picture: U8, mask: NDArray[np.bool_], seed: int) -> U8:
        if self._dm is None:
            self._dm = DreamMix.load(self.engine, threads=self._threads)
        fields: Any = {"seed": seed, "num_inference_steps": self._steps, **dict(way.fields)}
        result = self._dm.inpaint(Image.fromarray(picture), show_mask(mask), way.prompt, **fields)
        return np.asarray(result.images[0].convert("RGB"))


class Work:
    """The work folder: readings/KEY.json, pictures/KEY.png."""

    def __init__(self, folder: Path, painter: Painter) -> None:
        self._folder, self._painter = folder, painter
        self._metrics: tuple[Metric, ...] = (ObjectSeen(), Grad(), RingColour(), PsnrAsuka())

    def picture_of(self, way: Way, room: Room, number: int) -> Path:
        painter = self._painter.text_key if way.kind == "text" else self._painter.key
        return self._folder / "pictures" / f"{key_of_picture(painter, way, room, number)}.png"

    def read(self, way: Way, room: Room, number: int) -> Readings:
        """What a picture comes to; painted if it is not there yet."""
        place = self.picture_of(way, room, number)
        file = self._folder / "readings" / f"{place.stem}.json"
        if not file.exists():
            scene, mask = draw_room(number)
            given = scene.background if room == "empty room" else scene.image
            picture = self._painter.paint(way, given, mask, number)
            for each in (place, file):
                each.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as temporary:
                Image.fromarray(picture).save(temporary, "PNG")
            write_json(file, read_picture(self._metrics, picture, scene.background, mask))
        return dict(read_json(file))


def open_painter(given: argparse.Namespace) -> EnginePainter:
    return EnginePainter(given.work, given.asuka, given.steps, given.threads)


def read_picture(metrics: Sequence[Metric], picture: U8, truth: U8, mask: NDArray[np.bool_]) -> Readings:
    """Metric -> value, of a picture against the true room. Outside the hole the true room stands."""
    sample = Sample(picture, truth, mask, _NOBODY, "", "removal", {}).hold_against_scene()
    return {each.name: value for each in metrics if (value := each.add(sample)) is not None}


def mean_of(readings: Sequence[Readings], name: str) -> Mean:
    """The mean over rooms with its bootstrapped 95 % interval."""
    values = [each[name] for each in readings if name in each]
    low, high = bootstrap_interval(values) or (None, None)
    return Mean(float(np.mean(values)), len(values), low, high)


# -- things seen ------------------------------------------------------------------------------------------------------


def measure_seen(bench: Benchmark, given: argparse.Namespace) -> None:
    """Rows of every way, and the goal: things seen, the best text against the best prior."""
    work = Work(given.work, open_painter(given))
    tables: dict[Room, dict[str, list[Readings]]] = {"empty room": {}, "thing's room": {}}
    plans: list[tuple[Way, Room]] = [(way, "empty room") for way in WAYS] + [(way, "thing's room") for way in BRIEF]
    for way, room in plans:
        rooms = count_rooms(way, given.rooms, brief=room != "empty room")
        found = [work.read(way, room, number) for number in range(rooms)]
        tables[room][way.name] = found
        sys.stderr.write(f"{room}, {way.name}: a thing in {mean_of(found, ObjectSeen.name).mean:.3f}\n")
    bench.add("rooms", given.rooms)
    bench.add("steps of a picture", given.steps)
    for room, table in tables.items():
        add_table(bench, room, table)
    count = {way.name: sum(each[ObjectSeen.name] for each in tables["empty room"][way.name]) for way in WAYS}
    text, prior = (min(count[way.name] for way in WAYS if way.kind == kind) for kind in ("text", "prior"))
    bench.add("things seen: best text / best prior (none seen counts as one)", text / max(prior, 1), bound=">= 3")
    bench.add("things seen: best text / remove", text / max(count[REMOVE.name], 1))
    draw_rooms(work).save(given.work / "asuka-seen.png")


def add_table(bench: Benchmark, room: str, table: Mapping[str, list[Readings]]) -> None:
    for name, found in table.items():
        for metric, digits in ((ObjectSeen.name, 3), (RingColour.name, 1), (Grad.name, 1), (PsnrAsuka.name, 2)):
            bench.add(f"{room}, {name}: {metric}", spell(mean_of(found, metric), digits))


def draw_rooms(work: Work) -> Image.Image:
    """The first rooms, with every way's picture; marked where a thing is seen."""
    rows = []
    for number in range(SHOWN):
        scene, mask = draw_room(number)
        tiles = [(mark_region(Image.fromarray(scene.background), show_mask(mask)), "the hole")]
        for way in WAYS:
            with Image.open(work.picture_of(way, "empty room", number)) as opened:
                picture = opened.convert("RGB")
            seen = work.read(way, "empty room", number)[ObjectSeen.name]
            tiles.append((picture, f"{way.name}: {'a thing' if seen else 'nothing'}"))
        rows.append((f"room {number}", tiles))
    return draw_sheet(rows, "Holes that are to be empty")


# -- seams ------------------------------------------------------------------------------------------------------------


def send_round(
    networks: Networks, decoder: str, picture: U8, mask: NDArray[np.bool_], trips: int, darker: float = 0.0
) -> U8:
    """A picture whose hole was encoded and decoded `trips` times; what lies outside it is put back each time.

    decoder: "vae" or "asuka". picture: uint8 (H, W, 3), sides multiples of 8. mask: bool (H, W).
    darker: by which share it is before the first encoding.
    """
    known = {"image": to_latent_range(picture), "mask": mask.astype(np.float32)[None, None]}
    present = np.rint((1 - darker) * picture).astype(np.uint8)
    for _ in range(trips):
        latent = networks.run("vae_encoder", image=to_latent_range(present))["mean"]
        if decoder == "asuka":
            decoded = networks.run("asuka_decoder", latent=latent, **known)["picture"]
        else:
            decoded = networks.run("vae_decoder", latent=latent)["image"]
        present = np.where(mask[..., None], from_decoded(decoded), picture)
    return present


def compare_decoders(
    networks: Networks, rooms: int, metrics: Sequence[Metric], trips: int, darker: float = 0.0
) -> dict[str, list[Readings]]:
    """Decoder -> a reading of each room with a thing in the hole, sent round: nothing but the VAE changes it."""
    found: dict[str, list[Readings]] = {"vae": [], "asuka": []}
    for number in range(rooms):
        scene, mask = draw_room(number)
        for decoder, readings in found.items():
            picture = send_round(networks, decoder, scene.image, mask, trips, darker)
            readings.append(read_picture(metrics, picture, scene.image, mask))
    return found


def measure_seam(bench: Benchmark, given: argparse.Namespace) -> None:
    """Grad and colour of the ring after round trips."""
    networks = EngineSet.load(open_engine(open_painter(given).engine).parts, given.threads)
    metrics = (Grad(), RingColour(), PsnrAsuka())
    found = {trips: compare_decoders(networks, given.rooms, metrics, trips) for trips in TRIPS}
    bench.add("rooms", given.rooms)
    for trips, by_decoder in found.items():
        for decoder, readings in by_decoder.items():
            for metric in metrics:
                bench.add(f"{decoder}, round trips {trips}: {metric.name}", spell(mean_of(readings, metric.name), 2))
    for trips, by_decoder in found.items():
        for name, bound in ((Grad.name, "<= 0.75"), (RingColour.name, "<= 0.5")):
            ours, plain = (mean_of(by_decoder[decoder], name).mean for decoder in ("asuka", "vae"))
            bench.add(f"{name}, asuka / vae, round trips {trips}", ours / plain, bound=bound)
    draw_seams(networks).save(given.work / "asuka-seam.png")


def measure_shift(bench: Benchmark, given: argparse.Namespace) -> None:
    """The same of latents that are darker than the picture: what ASUKA's decoder is made for."""
    networks = EngineSet.load(open_engine(open_painter(given).engine).parts, given.threads)
    metrics = (Grad(), RingColour())
    for darker in (0.02, 0.05, 0.1):
        found = compare_decoders(networks, given.rooms, metrics, 1, darker)
        for metric in metrics:
            for decoder, readings in found.items():
                bench.add(f"{decoder}, {darker:.0%} darker: {metric.name}", spell(mean_of(readings, metric.name), 2))


def draw_seams(networks: Networks) -> Image.Image:
    """A corner of the seam in the first rooms after the trips, magnified."""
    rows = []
    for number in range(SHOWN):
        scene, mask = draw_room(number)
        box = _find_corner(mask)
        tiles = [(_magnify(scene.image, box), "the picture")]
        for trips in TRIPS:
            for decoder in ("vae", "asuka"):
                tiles.append(
                    (_magnify(send_round(networks, decoder, scene.image, mask, trips), box), f"{decoder}, {trips}")
                )
        marked = mark_region(Image.fromarray(scene.image), show_mask(mask))
        ImageDraw.Draw(marked).rectangle(box, outline=(255, 0, 0))
        rows.append((f"room {number}", [(marked, "where"), *tiles]))
    return draw_sheet(rows, "Round trips of the hole through the VAE")


def _find_corner(mask: NDArray[np.bool_], side: int = 56) -> tuple[int, int, int, int]:
    """A square around the hole's topmost pixel."""
    row, column = (int(each[0]) for each in np.nonzero(mask))
    top, left = (
        int(np.clip(each - side // 2, 0, size - side)) for each, size in zip((row, column), mask.shape, strict=True)
    )
    return left, top, left + side, top + side


def _magnify(picture: U8, box: tuple[int, int, int, int], times: int = 4) -> Image.Image:
    cut = Image.fromarray(picture).crop(box)
    return cut.resize((times * cut.width, times * cut.height), Image.Resampling.NEAREST)


# -- cost -------------------------------------------------------------------------------------------------------------


def measure_cost(bench: Benchmark, given: argparse.Namespace) -> None:
    """Seconds of `remove` at 1024x1024 and of an inpainting of the same steps and stages without guidance."""
    engine = open_painter(given).engine
    picture, mask = sample_place(1024)
    shared: Any = {"seed": 1, "num_inference_steps": given.steps}
    plain: Any = {**shared, "guidance_scale": 1.0, "subject": "", "patched_fraction": 1.0}
    with DreamMix.load(engine, threads=given.threads) as dm:
        seconds = median_seconds(
            {
                "remove": lambda: dm.remove(picture, mask, **shared),
                "inpainting, no guidance": lambda: dm.inpaint(picture, mask, "a mug", **plain),
                "inpainting, guidance": lambda: dm.inpaint(picture, mask, "a mug", **{**shared, "subject": ""}),
            },
            repeats=given.repeats,
        )
    for name, value in seconds.items():
        bench.add(f"{name} [s]", value)
    ratio = seconds["remove"] / seconds["inpainting, no guidance"]
    bench.add("steps", given.steps)
    bench.add("remove / inpainting without guidance", ratio, bound="<= 1.1")
    networks = EngineSet.load(open_engine(engine).parts, given.threads)
    rng, prior = np.random.default_rng(0), BaseFiles.open(asuka=given.asuka).find_own_extras().asuka
    assert prior is not None and prior.prior_side is not None
    arrays: dict[str, Any] = {
        "latent": rng.normal(size=(1, 4, 32, 32)).astype(np.float32),
        "image": rng.uniform(-1, 1, (1, 3, 256, 256)).astype(np.float32),
        "mask": (rng.random((1, 1, 256, 256)) < 0.3).astype(np.float32),
    }
    small = {"image": arrays["image"][..., : prior.prior_side, : prior.prior_side].copy()}
    small["mask"] = arrays["mask"][..., : prior.prior_side, : prior.prior_side].copy()
    each = median_seconds(
        {
            "prior": lambda: networks.run("asuka_prior", **small),
            "decoder of the VAE": lambda: networks.run("vae_decoder", latent=arrays["latent"]),
            "decoder of ASUKA": lambda: networks.run("asuka_decoder", **arrays),
        },
        repeats=3 * given.repeats,
    )
    for name, value in each.items():
        bench.add(f"{name} [ms]", 1000 * value)
        bench.add(f"{name}, share of remove", value / seconds["remove"])
    bench.add("decoder of ASUKA / of the VAE", each["decoder of ASUKA"] / each["decoder of the VAE"])


PARTS: Final = {"seen": measure_seen, "seam": measure_seam, "shift": measure_shift, "cost": measure_cost}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--asuka", type=Path, metavar="FOLDER", help="default: ASUKA of the embedded base")
    parser.add_argument("--rooms", type=int, default=200)
    parser.add_argument("--steps", type=int, default=12, help="of a picture")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("asuka-work"), help="where readings are kept")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    for name, least in {"rooms": 4 * SHOWN, "steps": 1, "repeats": 1, "threads": 1}.items():
        if getattr(given, name) < least:
            parser.error(f"--{name} is {getattr(given, name)}; it must be at least {least}")
    bench = Benchmark(f"asuka_{given.part}", threads=given.threads)
    PARTS[given.part](bench, given)
    return bench.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
