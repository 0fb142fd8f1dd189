"""``python -m dreammix_trt.trainer.micro --out DIR``: make the embedded model again from nothing.

The same as `dreammix-trt train-base`, which has the documented options.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from dreammix_trt.trainer.micro.recipe import Settings, run


def make_settings(
    out: Path,
    work: Path | None = None,
    *,
    device: str = "cpu",
    processes: int = 2,
    minutes_scale: float = 1.0,
    native_size: int = 256,
    seed: int = 0,
    smoke: bool = False,
) -> Settings:
    """The recipe's settings as the command line has them.

    out: the model folder to write, replaced atomically.
    work: stages and checkpoints; None: `out` with .work appended.
    device: "cpu" or "cuda".
    processes: single-threaded CPU processes.
    minutes_scale: multiplies every stage's steps and limits.
    native_size: side in pixels.
    smoke: a few steps of everything.
    """
    out = out.absolute()
    settings = Settings(
        out=out,
        work=(work or out.with_name(out.name + ".work")).absolute(),
        device=device,
        native=native_size,
        seed=seed,
        processes=processes,
    )
    if minutes_scale != 1.0:
        settings = settings.scale(minutes_scale)
    return settings.smoke() if smoke else settings


def parse(arguments: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(prog="dreammix_trt.trainer.micro", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write (replaced atomically)")
    parser.add_argument("--work", type=Path, help="stages and checkpoints (default: OUT with .work appended)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=2, help="single-threaded CPU processes")
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="multiplies every stage's steps and limits")
    parser.add_argument("--native-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    return make_settings(**vars(parser.parse_args(arguments)))


def train_again(settings: Settings) -> None:
    """Run the recipe; what it does goes to the log, which is shown on stderr."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("dreammix_trt.trainer").setLevel(logging.INFO)
    run(settings)


def main(arguments: list[str] | None = None) -> None:
    train_again(parse(arguments))


if __name__ == "__main__":
    main()
