"""What an installed wheel must do where nothing else is: `dev.py wheel` and cibuildwheel run this file by itself.

No pytest here. It must not find the source tree, needs no torch and no GPU, and ends with an error as soon as something
is not as users would want it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

BOX = (110, 70, 210, 190)  # of the picture, to be repainted


def run(*words: str, folder: str) -> str:
    """What a command of the installed program prints; its own exit code ends the trial."""
    command = [sys.executable, "-m", "dreammix_trt", *words]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Look at the installed package, then paint a picture with the embedded model."""
    import dreammix_trt

    assert Path(dreammix_trt.__file__).is_relative_to(sys.prefix), f"{dreammix_trt.__file__} is not the installed wheel"
    assert not list(Path(dreammix_trt.__file__).parent.parent.glob("dreammix_trt*.libs")), (
        "libraries came into the wheel"
    )
    assert find_spec("torch") is None, "the trial belongs into an environment without torch"
    with TemporaryDirectory() as folder:
        store = ["--store", str(Path(folder, "store"))]
        machine = json.loads(run("doctor", "--json", *store, folder=folder))
        assert machine["ready"] and machine["extension"], machine
        assert machine["kernels"] and "sm_89" in machine["kernels"]["architectures"], "the wheel has no CUDA kernels"
        paint(folder, store)
    known = ", ".join([*machine["kernels"]["architectures"], machine["kernels"]["ptx"]])
    print(
        f"dreammix-trt {version('dreammix-trt')}: installed, CUDA kernels for {known}, a picture painted without torch"
    )


def paint(folder: str, store: list[str]) -> None:
    """Build the embedded base, paint with it and take something out: the box changes, what is far from it does not."""
    from PIL import Image, ImageChops, ImageDraw

    picture, mask = Image.new("RGB", (320, 256), (200, 190, 170)), Image.new("L", (320, 256), 0)
    ImageDraw.Draw(picture).rectangle((0, 150, 320, 256), fill=(120, 80, 50))
    ImageDraw.Draw(mask).rectangle(BOX, fill=255)
    picture.save(Path(folder, "table.png"))
    mask.save(Path(folder, "mask.png"))
    run("build", "--out", "engine", *store, folder=folder)
    given = ["--image", "table.png", "--mask", "mask.png", "--steps", "4", *store]
    run("inpaint", "engine", *given, "--prompt", "a red mug", "--out", "out.png", folder=folder)
    run("remove", "engine", *given, "--out", "empty.png", folder=folder)
    for name in ("out.png", "empty.png"):
        with Image.open(Path(folder, name)) as painted:
            assert painted.size == picture.size
            changed = ImageChops.difference(painted.convert("RGB"), picture)
        left, right = changed.crop((0, 0, 60, 256)), changed.crop((260, 0, 320, 256))
        assert left.getbbox() is None and right.getbbox() is None, f"{name} changed far from its mask"
        inside = changed.crop(BOX).convert("L")
        assert inside.getbbox() is not None, f"{name}: nothing was painted"
        if name == "out.png":
            assert sum(inside.histogram()[9:]) > inside.width * inside.height // 2, "the marked region looks as before"


if __name__ == "__main__":
    main()
