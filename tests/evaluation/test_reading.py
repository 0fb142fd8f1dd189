"""A protocol's folder: what is read of it, and that every fault is named, all at once, before anything is painted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.evaluation.example import write_example
from dreammix_trt.evaluation.reading import read_protocol
from tests.support.protocols import SIDE, draw_mask, save, write_protocol


def test_a_protocol_is_subjects_times_scenes_times_prompts_times_seeds(tmp_path: Path) -> None:
    protocol = read_protocol(write_protocol(tmp_path / "p", subjects=2, scenes=3, seeds=2), {"num_inference_steps": 4})
    orders = list(protocol.orders())
    assert len(orders) == len(protocol) == 2 * 3 * 2 * 2
    assert len({order.name for order in orders}) == len(orders)
    assert [order.subject.name for order in orders] == sorted(order.subject.name for order in orders)
    assert orders[0].name == "mug-0/room-0.identity-1.0" and orders[-1].name == "mug-1/room-2.editing-1.1"
    assert protocol.fields == {"num_inference_steps": 4}
    edit = orders[2]
    assert edit.fields == {"prompt": "a red sks mug", "substitute": ["blue"], "subject": "mug-0", "seed": 0}
    assert edit.prompt.expected == {"colour": "red"} and len(edit.subject.photographs) == 2


def test_scenes_may_lie_as_the_trainers_photographs_do(tmp_path: Path) -> None:
    folder = write_protocol(tmp_path / "p", scenes=0)
    for kind, pixels in (("image", np.full((SIDE, SIDE, 3), 90, np.uint8)), ("mask", draw_mask())):
        (folder / "scenes" / kind).mkdir()
        save(folder / "scenes" / kind / "desk.png", pixels)
    assert [scene.name for scene in read_protocol(folder).scenes] == ["desk"]


def test_a_digest_changes_with_every_picture_and_word(tmp_path: Path) -> None:
    folder = write_protocol(tmp_path / "p")
    digests = {read_protocol(folder).digest(), read_protocol(folder).digest()}
    assert len(digests) == 1
    for file in ("scenes/room-1.png", "subjects/mug-0/image/1.png"):
        save(folder / file, np.full((SIDE, SIDE, 3), (9, 200, 30), np.uint8))
        digests.add(read_protocol(folder).digest())
    (folder / "protocol.json").write_text((folder / "protocol.json").read_text() + "\n")
    digests.add(read_protocol(folder).digest())
    assert len(digests) == 4


def change_entry(**changes: Any) -> Callable[[Path], None]:
    """Changes the first subject's entry."""

    def change(folder: Path) -> None:
        record = json.loads((folder / "protocol.json").read_text())
        record["subjects"]["mug-0"] |= changes
        (folder / "protocol.json").write_text(json.dumps(record))

    return change


def change_record(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "protocol.json").read_text()) | changes
        (folder / "protocol.json").write_text(json.dumps(record))

    return change


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no mask": (
        lambda folder: (folder / "scenes/room-0_mask.png").unlink(),
        r"room-0\.png: has no mask.*room-0_mask\.png",
    ),
    "mask of another size": (
        lambda folder: save(folder / "scenes/room-0_mask.png", draw_mask(20)),
        "room-0_mask.*20x20",
    ),
    "empty mask": (
        lambda folder: save(folder / "scenes/room-0_mask.png", draw_mask() * 0),
        "room-0_mask.*repaints nothing",
    ),
    "no picture": (lambda folder: (folder / "scenes/room-1.png").write_text("text"), r"room-1\.png"),
    "no photographs": (
        lambda folder: [file.unlink() for file in (folder / "subjects/mug-1/image").iterdir()],
        "subjects/mug-1",
    ),
    "unknown field": (change_record(subject={}), r"protocol\.json: subject is unknown"),
    "unknown field of a subject": (change_entry(promts=[]), r"subjects\.mug-0\.promts is unknown"),
    "unknown request field": (change_record(request={"stepz": 3}), r"subjects\.mug-0\.identity\[0\].*stepz"),
    "bad request value": (change_record(request={"lcg_fraction": 2}), "lcg_fraction is 2"),
    "shared prompt": (change_record(request={"prompt": "a mug"}), "request.prompt cannot be set here"),
    "shared seed": (change_record(request={"seed": 3}), "request.seed cannot be set here: give `seeds`"),
    "reference mode": (change_record(request={"mode": "reference"}), "mode 'reference'"),
    "seeds": (change_record(seeds=[1, 1]), r"seeds is \[1, 1\]"),
    "seeds of another kind": (change_record(seeds=[True]), r"seeds is \[True\]"),
    "no subjects": (change_record(subjects={}), "subjects is empty"),
    "a subject's bad name": (change_record(subjects={"a/b": {"identity": ["x"]}}), r"subjects\.a/b is no name"),
    "unknown scene": (change_entry(scenes=["hall"]), r"subjects\.mug-0\.scenes names 'hall'; there are room-0, room-1"),
    "empty prompt": (change_entry(identity=[{"substitute": ["blue"]}]), r"identity\[0\].*needs a prompt"),
    "twice a name": (
        change_entry(identity=[{"prompt": "a", "name": "x"}, {"prompt": "b", "name": "x"}]),
        "two prompts named 'x'",
    ),
    "nothing asked for": (change_entry(identity=[], editing=[]), "asks for nothing"),
    "expected of another kind": (change_entry(expected={"colour": 3}), r"subjects\.mug-0\.expected is \{'colour': 3\}"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_fault_is_named_with_its_file_and_field(name: str, tmp_path: Path) -> None:
    folder = write_protocol(tmp_path / "p")
    spoil, told = BAD[name]
    spoil(folder)
    with pytest.raises(InputError, match=told):
        read_protocol(folder)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    folder = write_protocol(tmp_path / "p", seeds=1, request={"mode": "reference"}, colour="red")
    (folder / "scenes/room-0_mask.png").unlink()
    with pytest.raises(InputError) as caught:
        read_protocol(folder, {"prompt": "x"})
    for word in ("--set.prompt cannot", "colour is unknown", "room-0.png", "mode 'reference'"):
        assert word in str(caught.value)


def test_what_is_no_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--example"):
        read_protocol(tmp_path / "nowhere")
    with pytest.raises(FileFormatError, match=r"protocol\.json is missing"):
        read_protocol(tmp_path)
    with pytest.raises(InputError, match="schema 2"):
        read_protocol(write_protocol(tmp_path / "p", schema=2))


def test_the_example_is_a_protocol_of_things_the_base_has_not_seen(tmp_path: Path) -> None:
    from dreammix_trt.evaluation.metrics.choice import Weights, choose_metrics
    from dreammix_trt.trainer.micro import world

    write_example(tmp_path / "p", subjects=2, scenes=1, size=64)
    before = (tmp_path / "p/protocol.json").read_bytes()
    protocol = read_protocol(tmp_path / "p")
    assert [subject.class_name for subject in protocol.subjects] == ["mug", "teapot"]
    assert {task: [p.text for s in protocol.subjects for p in s.prompts if p.task == task] for task in ("identity",)}
    for subject, thing in zip(protocol.subjects, world.held_out_subjects(2), strict=True):
        assert subject.expected["colour"] == thing.attributes.colour and world.is_held_out(thing.attributes)
        assert len(subject.photographs) == 5 and [scene.name for scene in subject.scenes] == [f"{subject.name}-room-1"]
    from dreammix_trt.core.checkpoint import BaseFiles

    choose_metrics(protocol, Weights(judge=BaseFiles.open().folder))  # the judge knows all that is expected
    write_example(tmp_path / "p", subjects=2, scenes=1, size=64)
    assert (tmp_path / "p/protocol.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        write_example(tmp_path / "mine", subjects=1, scenes=1, size=64)
