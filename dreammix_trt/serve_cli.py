"""`dreammix-trt serve`: engines over HTTP, with a page, until a signal."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreammix_trt.core.errors import DeviceError, InputError
from dreammix_trt.painting_cli import Device, Residency, Verify
from dreammix_trt.terminal import Store, Threads, say, show_progress

if TYPE_CHECKING:
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.service.loading import Loading
    from dreammix_trt.service.served import Served
    from dreammix_trt.service.settings import Settings

Engines = Annotated[list[Path], typer.Argument(help="Engine directories; the first is meant where nobody names one.")]
Host = Annotated[str, typer.Option(help="Where it listens; 0.0.0.0 lets other computers in.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="DREAMMIX_API_KEY",
        show_envvar=True,
        help="What clients must send. Others see an option in the list of processes; a variable they do not.",
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Let other computers in without a key.")]
Queue = Annotated[int, typer.Option(min=0, max=10000, help="How many requests may wait for an engine.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that a request has, waiting included.")]
Workers = Annotated[int, typer.Option(min=1, max=64, help="How many requests an engine paints at once.")]
Keep = Annotated[int, typer.Option(min=1, help="How many finished jobs are kept.")]
KeepMinutes = Annotated[float, typer.Option(min=0.0, help="For how long.")]
KeepMegabytes = Annotated[int, typer.Option(min=1, help="The most memory for their pictures.")]
BodyMegabytes = Annotated[int, typer.Option(min=1, help="The largest body of a request.")]
SubjectMegabytes = Annotated[int, typer.Option(min=1, help="The largest subject that may be uploaded.")]
Megapixels = Annotated[float, typer.Option(min=0.01, max=89, help="The largest picture.")]
Grace = Annotated[float, typer.Option(min=0.0, help="Seconds after SIGTERM or Ctrl-C to finish what was accepted.")]
Ray = Annotated[bool, typer.Option("--ray", help="Paint on replicas in a Ray cluster; without an address a local one.")]
RayAddress = Annotated[str | None, typer.Option(help="HOST:PORT of a cluster's head; auto: this machine's.")]
RayReplicas = Annotated[
    str | None,
    typer.Option(help="N for each engine, or MIN:MAX as requests come; left out: one for each GPU."),
]
LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Write each request into the log (--log-level info).")]

EXAMPLES = """
Examples:

dreammix-trt serve engines/mug

DREAMMIX_API_KEY=$(cat key) dreammix-trt serve engines/mug engines/teapot --host 0.0.0.0 --device cuda --workers 2

dreammix-trt serve engines/mug --device cuda --ray --ray-replicas 1:4
"""
PANELS = {
    "Who may come in": ("host", "port", "api_key", "insecure"),
    "How much at once": ("queue", "timeout", "workers", "body_megabytes", "subject_megabytes", "megapixels"),
    "On several GPUs or machines": ("ray", "ray_address", "ray_replicas"),
    "What is kept": ("keep", "keep_minutes", "keep_megabytes", "grace", "log_prompts"),
    "What it runs on": ("device", "residency", "threads", "store", "verify"),
}


def serve(
    engines: Engines,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    insecure: Insecure = False,
    queue: Queue = 16,
    timeout: Timeout = 60.0,
    workers: Workers = 1,
    body_megabytes: BodyMegabytes = 32,
    subject_megabytes: SubjectMegabytes = 256,
    megapixels: Megapixels = 16.77,
    keep: Keep = 64,
    keep_minutes: KeepMinutes = 60.0,
    keep_megabytes: KeepMegabytes = 512,
    grace: Grace = 30.0,
    log_prompts: LogPrompts = False,
    device: Device = "cpu",
    residency: Residency = None,
    threads: Threads = None,
    store: Store = None,
    verify: Verify = False,
    ray: Ray = False,
    ray_address: RayAddress = None,
    ray_replicas: RayReplicas = None,
) -> None:
    """Serve engines over HTTP: a page with a brush, an API of jobs, and those of OpenAI and AUTOMATIC1111."""
    from dreammix_trt.core.extras import require_serving

    require_serving()
    from dreammix_trt.serve_on_ray import open_painters
    from dreammix_trt.service.app import make_app
    from dreammix_trt.service.loading import Loading
    from dreammix_trt.service.running import Server
    from dreammix_trt.service.settings import MIB, Settings

    settings = Settings(
        host=host,
        port=port,
        api_key=api_key or "",
        insecure=insecure,
        body_bytes=body_megabytes * MIB,
        subject_bytes=max(subject_megabytes, body_megabytes) * MIB,
        bodies_bytes=2 * max(subject_megabytes, 8 * body_megabytes) * MIB,
        pixels=round(megapixels * 1e6),
        keep_results=keep,
        keep_seconds=keep_minutes * 60,
        keep_bytes=keep_megabytes * MIB,
        log_prompts=log_prompts,
    )
    names = _name_engines(engines)
    options: dict[str, Any] = {} if residency is None else {"residency": residency}
    options |= {"largest_picture": settings.pixels} if device == "cuda" else {}
    load = functools.partial(
        Loading, workers=workers, device=device, threads=threads, store=store, verify=verify, options=options
    )
    loadings = {name: load(path.resolve()) for name, path in zip(names, engines, strict=True)}
    if not ray and (ray_address or ray_replicas):
        raise InputError("--ray-address and --ray-replicas are for --ray: give that as well")
    with ExitStack() as cluster:
        with ExitStack() as opened, show_progress("loading") as update:
            fleet: Mapping[str, Sequence[Any]] = {}
            if ray:
                update(names[0], 0.0, "starting replicas")
                fleet = cluster.enter_context(
                    open_painters(loadings, ray_address, ray_replicas, seconds=timeout, tells=log_prompts)
                )
            served: list[Served] = []
            for name, loading in loadings.items():
                update(name, len(served) / len(engines))
                painters = fleet[name] if ray else list(_load(loading))
                served.append(_open(loading.path, name, painters, settings, queue, timeout))
                opened.callback(served[-1].queue.close)
            at_once = served[0].queue.workers
            tell = functools.partial(_tell, names, at_once, queue, timeout)
            server = Server(make_app(served, settings), settings, grace, tell)
            opened.pop_all()  # the app closes them
        server.serve_to_end()
    if server.lost:
        raise DeviceError(
            "all devices were lost, so the service has ended: start it again (--log-level info says more)"
        )


def _load(loading: Loading) -> Sequence[DreamMix]:
    """The painters of an engine in this process."""
    painters = loading.open()
    if painters[0].studio is not None:
        say(str(painters[0].studio.plan))
    return painters


def _tell(names: Sequence[str], workers: int, queue: int, timeout: float, address: str) -> None:
    say(f"{', '.join(names)}: {workers} at a time, {queue} may wait, {timeout:g} s each")
    say(f"serving at {address} (Ctrl-C ends it)")


def _name_engines(engines: Sequence[Path]) -> list[str]:
    """What clients call the engines: their directories' names."""
    names = [path.resolve().name for path in engines]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two engines are called {twice[0]!r}: clients call them by their directories; rename one")
    return names


def _open(path: Path, name: str, painters: Sequence[Any], settings: Settings, queue: int, timeout: float) -> Served:
    """An engine behind its queue, which owns the painters."""
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.service.served import Served

    try:
        return Served(
            name,
            painters,
            waiting=queue,
            timeout=timeout,
            backend=Passport.read(path).backend,
            most_subjects=settings.most_subjects,
            log_prompts=settings.log_prompts,
        )
    except BaseException:
        for each in reversed(painters):
            each.close()
        raise
