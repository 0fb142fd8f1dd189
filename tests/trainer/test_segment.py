"""Segmenters: any file of the kind, both normalisations, and masks that never replace one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.trainer.photographs import read_photographs
from dreammix_trt.trainer.segment import open_segmenter, segment_photographs

onnx = pytest.importorskip("onnx")

#: a picture's value 0 after either normalisation, in the red channel
BLACK = {"u2net": -0.485 / 0.229, "isnet": -0.5}


def write_network(
    path: Path,
    *,
    side: int | str = 320,
    logits: bool = False,
    half: bool = False,
    constant: bool = False,
    second_output: bool = True,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Path:
    """A segmenter in which red is the subject: its first output is scale * red + shift, the second one nonsense."""
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    number = np.float16 if half else np.float32
    weight = np.zeros((1, 3, 1, 1), number)
    weight[0, 0] = 0 if constant else scale
    nodes = [onnx.helper.make_node("Conv", ["img", "w", "b"], ["raw"])]
    last = "raw"
    if not logits:
        nodes.append(onnx.helper.make_node("Clip", ["raw", "low", "high"], ["clipped"]))
        last = "clipped"
    nodes.append(onnx.helper.make_node("Identity", [last], ["d0"]))
    outputs = [onnx.helper.make_tensor_value_info("d0", kind, [1, 1, side, side])]
    if second_output:
        nodes.append(onnx.helper.make_node("Neg", ["d0"], ["d1"]))
        outputs.append(onnx.helper.make_tensor_value_info("d1", kind, [1, 1, side, side]))
    constants = {"w": weight, "b": np.array([shift], number), "low": np.array(0, number), "high": np.array(1, number)}
    graph = onnx.helper.make_graph(
        nodes,
        "segmenter",
        [onnx.helper.make_tensor_value_info("img", kind, [1, 3, side, side])],
        outputs,
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def make_scene(width: int = 80, height: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """A red thing on something blue and green; and where it is."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 90, (height, width, 3), np.uint8)
    image[..., 2] += 120
    where = np.zeros((height, width), bool)
    where[20:45, 30:60] = True
    image[where] = (250, 20, 30)
    image[0, 0] = (0, 0, 255)
    return image, where


def write_photographs(folder: Path, count: int = 2) -> Path:
    (folder / "image").mkdir(parents=True)
    for index in range(count):
        Image.fromarray(make_scene()[0]).save(folder / "image" / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("name", "options", "style", "size"),
    [
        ("u2net.onnx", {"side": 32}, "u2net", 32),
        ("silueta.onnx", {"side": "S"}, "u2net", 320),
        ("isnet-general-use.onnx", {"side": 32}, "isnet", 32),
        ("isnet.onnx", {"side": "S"}, "isnet", 1024),
        ("model.onnx", {"side": 320}, "u2net", 320),
        ("model.onnx", {"side": 1024}, "isnet", 1024),
        ("BiRefNet-general.onnx", {"side": 1024, "logits": True}, "u2net", 1024),
        ("half.onnx", {"side": 64, "half": True, "second_output": False}, "u2net", 64),
    ],
)
def test_files_of_the_kind(tmp_path: Path, name: str, options: dict[str, Any], style: str, size: int) -> None:
    segmenter = open_segmenter(write_network(tmp_path / name, **options))
    assert (segmenter.style, segmenter.size) == (style, (size, size))
    image, where = make_scene()
    mask = segmenter.find_subject(image)
    assert mask is not None and mask.shape == where.shape and mask.dtype == np.uint8
    assert ((mask > 127) == where).mean() > 0.97
    assert mask.min() == 0 and mask.max() == 255  # stretched to the whole range


@pytest.mark.parametrize("style", ["u2net", "isnet"])
def test_pictures_are_normalised_as_the_style_says(tmp_path: Path, style: str) -> None:
    """The network lets through what lies above black by half a unit: nothing of a wrong normalisation would pass."""
    network = write_network(tmp_path / "n.onnx", side=8, scale=1.0, shift=-BLACK[style])
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4, :4, 0], image[4:, :, 2] = 51, 255  # 0.2 of the brightest value
    image[:4, 4:, 0] = 255
    mask = open_segmenter(network, style).find_subject(image)
    assert mask is not None
    deviation = {"u2net": 0.229, "isnet": 1.0}[style]
    assert mask[0, 0] == pytest.approx(255 * min(1.0, 0.2 / deviation), abs=1)
    assert mask[7, 0] == 0 and mask[0, 7] == 255


def test_a_style_is_said_or_guessed(tmp_path: Path) -> None:
    file = write_network(tmp_path / "u2net.onnx", side=32)
    assert open_segmenter(file, "isnet").style == "isnet"
    with pytest.raises(InputError, match="style 'sam' is none of u2net, isnet"):
        open_segmenter(file, "sam")


def test_rembgs_own_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"--segmenter is missing.*u2net\.onnx"):
        open_segmenter(None)
    write_network(tmp_path / "u2net.onnx", side=32)
    assert open_segmenter(None).file == tmp_path / "u2net.onnx"


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.onnx: there is no such file"):
        open_segmenter(tmp_path / "absent.onnx")
    (tmp_path / "page.onnx").write_text("<!doctype html><html></html>")
    with pytest.raises(FileFormatError, match=r"page\.onnx is no ONNX network.*download it again"):
        open_segmenter(tmp_path / "page.onnx")
    add = onnx.helper.make_node("Add", ["a", "b"], ["c"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "abc"]
    graph = onnx.helper.make_graph([add], "sum", values[:2], values[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "sum.onnx")
    with pytest.raises(FileFormatError, match=r"sum\.onnx is no U²-Net or ISNet: it takes a \[4\], b \[4\]"):
        open_segmenter(tmp_path / "sum.onnx")


def test_missing_masks_are_made_and_others_stay(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photos", 3)
    (folder / "mask").mkdir()
    own = np.zeros((60, 80), np.uint8)
    own[:10, :10] = 255
    Image.fromarray(own).save(folder / "mask" / "1.png")
    before = (folder / "mask" / "1.png").read_bytes()
    told: list[str] = []
    segmenter = open_segmenter(write_network(tmp_path / "u2net.onnx", side=64))
    new = segment_photographs(folder, segmenter, lambda *event: told.append(event[2]))
    assert [path.name for path in new.made] == ["0.png", "2.png"] and told == ["0.png", "1.png", "2.png"]
    assert (folder / "mask" / "1.png").read_bytes() == before
    files = read_photographs(folder)
    assert len(files) == 3
    assert ((files[0].read().subject) == make_scene()[1]).mean() > 0.97
    assert not segment_photographs(folder, segmenter).made
    assert sorted(path.name for path in (folder / "mask").iterdir()) == ["0.png", "1.png", "2.png"]


def test_flat_folders_and_those_of_other_trainers_get_a_mask_folder(tmp_path: Path) -> None:
    segmenter = open_segmenter(write_network(tmp_path / "u2net.onnx", side=64))
    for folder in (tmp_path / "flat", tmp_path / "kohya" / "10_sks mug"):
        folder.mkdir(parents=True)
        Image.fromarray(make_scene()[0]).save(folder / "0.jpg", quality=95)
        new = segment_photographs(folder, segmenter)
        assert new.made == [folder / "mask" / "0.png"]
        assert [file.name for file in read_photographs(folder)] == ["0.jpg"]
    assert [file.name for file in read_photographs(tmp_path / "kohya")] == ["0.jpg"]


def test_photographs_without_a_subject_are_named(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photos", 1)
    segmenter = open_segmenter(write_network(tmp_path / "u2net.onnx", side=64, constant=True))
    new = segment_photographs(folder, segmenter)
    assert not new.made and [path.name for path in new.unseen] == ["0.png"]
    assert not (folder / "mask").exists()
