"""The work of the ablation: LoRAs, pictures and their readings, each kept in a folder, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any, Protocol

import numpy as np
from _ablation_cases import Case, Training, dictionary, draw_place, key_of, lora_facts, picture_facts, subject
from _micro_subjects import KEPT
from PIL import Image

from dreammix_trt.building import build
from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.files import atomic_file, read_json, write_json
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.engine import DreamMix
from dreammix_trt.evaluation.metrics.judged import AttributesKept, EditSuccess, Jury, SubjectCosine
from dreammix_trt.evaluation.metrics.metric import Metric, Sample
from dreammix_trt.evaluation.metrics.pixels import SeamGradient
from dreammix_trt.evaluation.protocol import Subject
from dreammix_trt.regularize import Regular, paint_regular
from dreammix_trt.trainer import checkpoints, lora
from dreammix_trt.trainer.folder import RECORD
from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.judge import expected_reading
from dreammix_trt.trainer.micro.world import write_photos
from dreammix_trt.trainer.photographs import read_photographs
from dreammix_trt.trainer.recipes import SMALL

Values = dict[str, float | None]
Picture = world.Picture
REGULAR_STEPS = 12


class Studio(Protocol):
    """What trains, paints and judges; in tests a fake."""

    base: str
    painter: str  # what paints, where that is not the base alone; else ""

    def train(self, number: int, training: Training, out: Path) -> None:
        """Write a subject's LoRA to the folder `out`, whole or not at all."""
        ...

    def paint(self, case: Case, lora: Path | None) -> Picture:
        """lora: None: the base alone."""
        ...

    def judge(self, case: Case, picture: Picture) -> Values: ...


class Work:
    """The work folder: loras/KEY/, readings/KEY.json, pictures/KEY.jpg."""

    def __init__(self, folder: Path, studio: Studio, tell: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self._studio, self._tell = folder, studio, tell
        for name in ("loras", "readings", "pictures"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def list_ready(self, cases: Iterable[Case]) -> list[tuple[Case, Values]]:
        """The cases that are finished, with their readings."""
        return [(case, values) for case in cases if (values := self.find(case)) is not None]

    def lora_of(self, number: int, training: Training | None) -> Path:
        return self.folder / "loras" / key_of(self._studio.base, *lora_facts(number, training))

    def picture_of(self, case: Case) -> Path:
        return self.folder / "pictures" / f"{self._key(case)}.jpg"

    def find(self, case: Case) -> Values | None:
        """The reading of a picture that is finished; None: it is not."""
        file = self._reading_of(case)
        return dict(read_json(file)["values"]) if file.exists() else None

    def finish(self, cases: Iterable[Case]) -> list[tuple[Case, Values]]:
        """Train, paint and judge what is not there yet; every case with its reading."""
        done, left = list[tuple[Case, Values]](), list(cases)
        clock = _Clock(self, left)
        for case in left:
            values = self.find(case)
            if values is None:
                place = self._train(case.place.subject, case.way.training, clock)
                with clock.spend("picture"):
                    values = self._measure(case, place)
                self._tell(f"{clock}: {case.row}, subject {case.place.subject}, {case.edit.prompt!r}")
            done.append((case, values))
        return done

    def _train(self, number: int, training: Training | None, clock: _Clock) -> Path | None:
        """The folder of a LoRA, trained if it is not there; None: none is asked for."""
        if training is None:
            return None
        place = self.lora_of(number, training)
        if not (place / RECORD).exists():
            self._tell(f"{clock}: training subject {number} as {training}")
            with clock.spend("lora"):
                self._studio.train(number, training, place)
        return place

    def judge_real(self, case: Case) -> Values:
        """What the judge makes of the world's own rendering of what a case asks for."""
        scene, _ = draw_place(case.place, case.edit)
        return self._studio.judge(case, scene.image)

    def _measure(self, case: Case, place: Path | None) -> Values:
        picture = self._studio.paint(case, place)
        with atomic_file(self.picture_of(case)) as temporary:
            Image.fromarray(picture).save(temporary, "JPEG", quality=90)
        values = self._studio.judge(case, picture)
        write_json(self._reading_of(case), {"values": values, "prompt": case.edit.prompt, "fields": case.fields})
        return values

    def _reading_of(self, case: Case) -> Path:
        return self.folder / "readings" / f"{self._key(case)}.json"

    def _key(self, case: Case) -> str:
        painter = [self._studio.painter] if self._studio.painter else []
        return key_of(self.lora_of(case.place.subject, case.way.training).name, *picture_facts(case), *painter)


class _Clock:
    """How much is done, and how long the rest takes at the pace so far. As text: "12 of 80, 9 min left"."""

    def __init__(self, work: Work, cases: list[Case]) -> None:
        missing = [case for case in cases if work.find(case) is None]
        trainings = {(case.place.subject, case.way.training) for case in missing if case.way.training}
        loras = {work.lora_of(*each) for each in trainings}
        self._left = {"lora": sum(not (each / RECORD).exists() for each in loras), "picture": 0}
        self._left["picture"] = len({work.picture_of(case) for case in missing})
        self._total, self._spent = len({work.picture_of(case) for case in cases}), {"lora": [180.0], "picture": [2.0]}

    @contextmanager
    def spend(self, what: str) -> Iterator[None]:
        """Time the block, which makes one of what is left."""
        start = time.perf_counter()
        yield
        self._spent[what].append(time.perf_counter() - start)
        self._left[what] -= 1

    def __str__(self) -> str:
        paces = {what: np.mean(spent[1:] or spent) for what, spent in self._spent.items()}
        seconds = sum(count * paces[what] for what, count in self._left.items())
        return f"{self._total - self._left['picture']} of {self._total} pictures, {seconds / 60:.0f} min left"


class MicroStudio:
    """The embedded model: its trainer, its runtime, its judge."""

    def __init__(
        self,
        folder: Path,
        threads: int = 1,
        few_step: Path | None = None,
        asuka: bool = False,
        tokens: Path | None = None,
    ) -> None:
        """folder: the work folder, where the engine is built once.

        few_step: a few-step LoRA, merged into the base that paints; subjects are trained on the base without it.
        asuka: whether pictures depend on the base's ASUKA.
        tokens: the token adapter that the engine has; a picture without tokens does not depend on it.
        """
        self._folder, self._threads = folder, threads
        files = BaseFiles.open()
        self.base = key_of(files.hash_contents())
        self.painter = "" if few_step is None else hashlib.sha256(few_step.read_bytes()).hexdigest()[:16]
        if asuka:
            found = files.find_own_extras().asuka
            if found is None:
                raise SystemExit("the embedded base has no ASUKA")
            self.painter += key_of("asuka", found.hash_files())
        engine = build_once(folder, self.painter, few_step, tokens)
        self._dm, self._jury = DreamMix.load(engine, threads=threads), Jury(files.folder)
        metrics: list[Metric] = [EditSuccess(self._jury), AttributesKept(self._jury), SubjectCosine(self._jury)]
        self._metrics = [*metrics, SeamGradient()]
        self._subjects: dict[int, Subject] = {}
        self._loaded = ("", "")  # the LoRA's folder and the name it has in the engine

    def train(self, number: int, training: Training, out: Path) -> None:
        known, work = dictionary(number), out.with_name(f"{out.name}.work")
        begun = (work / checkpoints.FOLDER / checkpoints.RECORD).exists()
        lora.train_lora(
            self._photographs(number),
            known.class_name,
            out,
            attributes=known if training.captioned else None,
            regular=self._paint_regular(number, training) if training.beta else None,
            rank=training.rank,
            steps=training.steps,
            seed=number,
            threads=self._threads,
            resume=begun,
            work=work,
            progress=_say_training,
            recipe=replace(SMALL, beta=training.beta, checkpoint_every=100),
        )
        with suppress(OSError):
            rmtree(work)

    def paint(self, case: Case, lora: Path | None) -> Picture:
        return inpaint_case(self._dm, case, subject=self._load(lora))

    def _load(self, lora: Path | None) -> str:
        """The name that a LoRA has in the engine, which holds one of them; "": none is asked for."""
        if lora is None:
            return ""
        if self._loaded[0] != str(lora):
            if self._loaded[1]:
                self._dm.remove_subject(self._loaded[1])
            self._loaded = (str(lora), self._dm.add_subject(lora, "subject", token="sks"))
        return self._loaded[1]

    def judge(self, case: Case, picture: Picture) -> Values:
        scene, mask = draw_place(case.place)
        changed = dict([case.edit.changed]) if case.edit.changed else {}
        known = self._subject(case.place.subject)
        sample = Sample(picture, scene.background, mask, known, case.edit.prompt, case.task, changed)
        return score({metric.name: metric.add(sample) for metric in self._metrics})

    def _photographs(self, number: int) -> Path:
        place = self._folder / "photographs" / str(number)
        finished = place.with_name(f"{number}.finished")
        if not finished.exists():
            write_photos(place, subject(number))
            finished.touch()
        return place

    def _paint_regular(self, number: int, training: Training) -> Path:
        """Regular pictures in the subject's own photographs, as `regularize` paints them."""
        known = dictionary(number)
        bare = AttributeDictionary.of(known.class_name, {}, "hand", known.class_name)
        order = Regular(
            bare if training.regular == "class" else known,
            count=SMALL.regular_pictures,
            seed=number,
            contrast=0.0 if training.regular == "class" else 0.5,
            photographs=tuple(read_photographs(self._photographs(number))),
            base=self.base,
            fields=(("num_inference_steps", REGULAR_STEPS),),
        )
        place = self._folder / "regular" / f"{number}-{training.regular}"
        place.parent.mkdir(exist_ok=True)
        paint_regular(self._dm, order, place)
        return place

    def _subject(self, number: int) -> Subject:
        """As metrics know it: its photographs, and what is to be seen of it."""
        if number not in self._subjects:
            files = tuple(read_photographs(self._photographs(number)))
            reading = expected_reading(subject(number).attributes)
            expected = {part: word for part, word in reading.items() if part in KEPT and word != "none"}
            shape = subject(number).attributes.shape
            self._subjects[number] = Subject(str(number), "subject", shape, "sks", files, expected, (), ())
        return self._subjects[number]


def build_once(folder: Path, painter: str = "", few_step: Path | None = None, tokens: Path | None = None) -> Path:
    """An engine of the embedded base in the work folder, built if it is not there. See `MicroStudio`."""
    adapter = key_of(TokenAdapter.open(tokens).hash_files()) if tokens else ""
    engine = folder / f"engine{painter}{adapter}"
    if not engine.exists():
        build(out=engine, base_loras=[str(few_step)] if few_step else (), tokens=tokens)
    return engine


def inpaint_case(dm: DreamMix, case: Case, **fields: Any) -> Picture:
    """Paint a case into its room. fields: of the request, beside the case's own."""
    scene, mask = draw_place(case.place)
    image = Image.fromarray(scene.background)
    result = dm.inpaint(image, world.show_mask(mask), case.edit.prompt, **fields, **case.fields)
    return np.asarray(result.images[0].convert("RGB"))


def score(values: Mapping[str, float | None]) -> Values:
    """The figures of the tables: right, kept, both, cosine, seam. None: an identity has no edit."""
    right, kept = values[EditSuccess.name], values[AttributesKept.name]
    both = None if right is None else float(right == 1 and kept == 1)
    whole = float(kept == 1) if right is None else None
    named = {"right": right, "kept": kept, "both": both, "all kept": whole}
    return {**named, "cosine": values[SubjectCosine.name], "seam": values[SeamGradient.name]}


def _say_training(name: str, fraction: float, message: str) -> None:
    if int(fraction * 1000) % 100 == 0:
        sys.stderr.write(f"  {name} {fraction:.0%} {message}\n")
