"""What the command line adds to a training: pictures while it runs, by our own runtime, and `train.html` at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dreammix_trt.core.errors import DreamMixError, InputError
from dreammix_trt.train_validation import Painted, Validator, keep_painted, read_painted

if TYPE_CHECKING:
    from dreammix_trt.trainer.events import Events
    from dreammix_trt.trainer.folder import Factors, TrainRecord
    from dreammix_trt.trainer.photographs import PhotographFile
    from dreammix_trt.trainer.task import Task

log = logging.getLogger(__name__)


@dataclass
class TrainWatch:
    """A `trainer.watching.Watch`.

    work: the folder that gets `validation/`.
    every: steps between pictures; 0: none are painted.
    prompts: what they show; (): the subject's own prompt, and in red.
    engine: of the same base, which paints them; None: as `Validator` takes it.
    image, mask: where they are painted, as `Validator` takes them.
    events: gets every picture, too.
    """

    work: Path
    every: int = 0
    prompts: Sequence[str] = ()
    engine: Path | None = None
    image: Path | None = None
    mask: Path | None = None
    threads: int | None = None
    events: Events | None = None
    painted: list[Painted] = field(default_factory=list, init=False)
    _begun: bool = field(default=False, init=False)
    _validator: Validator | None = field(default=None, init=False)
    _photographs: Sequence[PhotographFile] = field(default=(), init=False)

    def begin(self, task: Task) -> None:
        """Load the engine that paints. Raises InputError for options of pictures that are not wanted."""
        self._photographs = task.photographs
        if not self.every:
            if self.prompts or self.engine or self.image or self.mask:
                raise InputError(
                    "--validate-prompt, --validate-engine, --validation-image and --validation-mask need "
                    "--validate-every STEPS"
                )
            return
        names = task.names
        self._validator = Validator(
            self.work,
            task.base,
            self.prompts or (names.prompt, f"a photo of a red {names.token} {names.class_name}"),
            token=names.token,
            class_name=names.class_name,
            base_loras=task.base_loras,
            engine=self.engine,
            photographs=task.photographs,
            image=self.image,
            mask=self.mask,
            seed=task.seed,
            threads=self.threads,
        )

    def after_step(self, step: int, factors: Callable[[], Factors]) -> None:
        """Paint if it is time. Pictures that fail are reported; the training goes on."""
        try:
            if not self._begun:
                self._recall(step)
            if self._validator is not None and step % self.every == 0:
                made = self._validator.paint(step, factors())
                self.painted += made
                keep_painted(self.work, self.painted)
                self._tell_events(made)
        except (DreamMixError, OSError) as error:
            log.warning("no pictures of step %d: %s", step, error)

    def _tell_events(self, made: Sequence[Painted]) -> None:
        if self.events is not None:
            for each in made:
                self.events.add_picture(each.step, f"{each.place}/{each.prompt}", each.file)

    def _recall(self, step: int) -> None:
        """Take up the pictures of the steps before the first one of this run, and forget all others.

        They are those of the training that goes on; one that begins anew begins with step 1, before which there are
        none.
        """
        self._begun = True
        known = read_painted(self.work)
        self.painted = [each for each in known if each.step < step]
        if len(self.painted) < len(known):
            keep_painted(self.work, self.painted)

    def finish(self, folder: Path, record: TrainRecord, history: Sequence[float], plan: Sequence[str]) -> None:
        """Write train.html. A page that fails is reported; the LoRA is written all the same."""
        from dreammix_trt.train_report import FILE, write_report

        try:
            write_report(folder, record, history, self.painted, photographs=self._photographs, plan=plan)
        except (DreamMixError, OSError) as error:
            log.warning("%s is not made: %s", FILE, error)

    def close(self) -> None:
        """Release the engine."""
        if self._validator is not None:
            self._validator.close()
