"""``python -m dreammix_trt.trainer.micro --out DIR``: make the embedded model again from nothing."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from dreammix_trt.trainer.micro.recipe import Settings, run


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
    args = parser.parse_args(arguments)
    out = args.out.absolute()
    settings = Settings(
        out=out,
        work=(args.work or out.with_name(out.name + ".work")).absolute(),
        device=args.device,
        native=args.native_size,
        seed=args.seed,
        processes=args.processes,
    )
    if args.minutes_scale != 1.0:
        settings = settings.scale(args.minutes_scale)
    return settings.smoke() if args.smoke else settings


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    run(parse(arguments))


if __name__ == "__main__":
    main()
