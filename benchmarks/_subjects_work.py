"""Subjects from one picture in an engine, and the studio that paints every way to tell of a subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _ablation_cases import Case, draw_place, subject
from _ablation_work import MicroStudio, Picture, Values, build_once, inpaint_case
from _subjects_cases import Choice, Reference, Rendering, portraits, reference_of
from _subjects_leak import read_leak
from PIL import Image

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.reference_pictures import place_on_white
from dreammix_trt.core.stored import Floats
from dreammix_trt.core.subject import Subject
from dreammix_trt.core.subject_tokens import mark_cells
from dreammix_trt.core.token_adapter import FILE_NAME, TokenAdapter
from dreammix_trt.core.token_rows import Tokens
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.enrolment import encode_class, find_features, project, read_references
from dreammix_trt.trainer.micro import world


class TokenTable:
    """Subjects from one picture in an engine, each enrolled when it is first asked for."""

    def __init__(self, dm: DreamMix) -> None:
        """dm: an engine with a token adapter."""
        self.dm = dm
        self._names: dict[tuple[int, int, Choice], str] = {}

    def find(self, number: int, photograph: int, choice: Choice) -> str:
        """The name of a subject whose reference is one of its photographs."""
        key = (number, photograph, choice)
        if key not in self._names:
            self._names[key] = self._enroll(number, photograph, choice)
        return self._names[key]

    def _enroll(self, number: int, photograph: int, choice: Choice) -> str:
        image, mask = show_photograph(number, photograph)
        name, class_name = f"{choice}-{number}-{photograph}", subject(number).attributes.shape
        if choice == "discriminative":
            self.dm.enroll(image, mask, class_name=class_name, name=name)
            return name
        rows = self._draw_rows(image, mask, class_name, np.random.default_rng([94, number, photograph]))
        self.dm.add_subject(Subject(name, "", class_name, tokens=Tokens(rows, self._adapter.sha256)))
        return name

    def _draw_rows(self, image: Image.Image, mask: Image.Image, class_name: str, rng: np.random.Generator) -> Floats:
        """Rows of the object's cells in the order of chance, as many as an engine takes."""
        dm, config = self.dm, self._adapter.config
        references = read_references(image, mask, None, config)
        text = encode_class(class_name, dm.tokenizers, dm.networks)
        [features] = find_features(references, text, dm.networks, dm.facts, config)
        cells = rng.permutation(np.flatnonzero(references[0].inside))[: config.tokens]
        return project(features[cells], dm.networks, config)

    @property
    def _adapter(self) -> TokenAdapter:
        assert self.dm.runtime.adapter is not None
        return self.dm.runtime.adapter


class SubjectStudio(MicroStudio):
    """The ablation's trainer, painter and judge, and beside them engines with token adapters.

    Pictures without tokens are painted by the first engine.
    """

    def __init__(self, folder: Path, adapters: Sequence[Path], threads: int = 1) -> None:
        """adapters: files or folders of token adapters; an engine of each is built in the work folder."""
        super().__init__(folder, threads, tokens=adapters[0])
        self.painter = "subjects"  # readings have figures that the ablation's have not
        self._adapters = {identify(adapter): adapter for adapter in adapters}
        self._tables: dict[str, TokenTable] = {identify(adapters[0]): TokenTable(self._dm)}

    def paint(self, case: Case, lora: Path | None) -> Picture:
        source = case.way.source
        if source is None:
            return super().paint(case, lora)
        if isinstance(source, Rendering):
            return render_case(case, source)
        assert isinstance(source, Reference)
        table = self._open(source.adapter)
        tokens = table.find(case.place.subject, reference_of(case.place), source.choice)
        if lora is None:
            return inpaint_case(table.dm, case, subject=tokens)
        return inpaint_case(self._dm, case, subject=self._load(lora), token_subject=tokens)

    def judge(self, case: Case, picture: Picture) -> Values:
        return {**super().judge(case, picture), **read_leak(picture, case.place)}

    def _open(self, adapter: str) -> TokenTable:
        if adapter not in self._tables:
            engine = build_once(self._folder, tokens=self._adapters[adapter])
            self._tables[adapter] = TokenTable(DreamMix.load(engine, threads=self._threads))
        return self._tables[adapter]


def identify(adapter: Path) -> str:
    """sha256 of an adapter's file."""
    return TokenAdapter.open(adapter).hash_files()[FILE_NAME]


def find_adapter() -> Path | None:
    """The embedded base's own adapter; None: it has none."""
    found = BaseFiles.open().find_own_extras().tokens
    return found.file if found else None


def count_cells(adapter: Path, numbers: Sequence[int]) -> float:
    """All tokens: the mean number of cells with any pixel of the object, over the references of these subjects."""
    config = TokenAdapter.open(adapter).config
    counts = [
        mark_cells(place_on_white(scene.image, scene.alpha > 0.5, config.side)[1], config).sum()
        for number in numbers
        for scene in portraits(number)
    ]
    return float(np.mean(counts))


def show_photograph(number: int, photograph: int) -> tuple[Image.Image, Image.Image]:
    """A subject's photograph and its mask, as its owner would hand them over."""
    scene = portraits(number)[photograph]
    return Image.fromarray(scene.image), world.show_mask(scene.alpha > 0.5)


def render_case(case: Case, source: Rendering) -> Picture:
    """The world's own picture of what a case asks for."""
    pose = portraits(case.place.subject)[reference_of(case.place)].view if source.posed else None
    return draw_place(case.place, case.edit, pose)[0].image
