"""`dreammix-trt serve --ray`: how many replicas there are, and what each of them gets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from dreammix_trt.core.errors import InputError
from dreammix_trt.ray_cluster import describe_need, list_nodes, open_cluster

if TYPE_CHECKING:
    from dreammix_trt.service.fleet import Bounds
    from dreammix_trt.service.loading import Loading
    from dreammix_trt.service.remote import RayPainter


@contextmanager
def open_painters(
    loadings: Mapping[str, Loading], address: str | None, replicas: str | None, *, seconds: float, tells: bool
) -> Iterator[dict[str, list[RayPainter]]]:
    """The painters of each engine, by its name. Their replicas, and a cluster of our own, end with the block.

    loadings: all for the same device.
    address: of a cluster; None: a local one is started.
    replicas: "N" or "MIN:MAX" for each engine; None: one for each GPU, and one where there is none.
    seconds, tells: as for `open_fleet`.

    Raises InputError for what does not go together, for a cluster that does not answer or is too small, EngineError and
    FileFormatError for an engine that cannot be loaded.
    """
    from dreammix_trt.engine.directory import open_engine
    from dreammix_trt.service.fleet import Bounds, open_fleet
    from dreammix_trt.service.remote import RayPainter

    first = next(iter(loadings.values()))
    on_gpu, count = first.device == "cuda", len(loadings)
    if first.workers > 1 and not on_gpu:
        raise InputError(
            f"--workers {first.workers} --ray: without a GPU a replica paints one request at a time; ask for "
            f"--ray-replicas {first.workers}"
        )
    asked = None if replicas is None else Bounds.read(replicas)
    for loading in loadings.values():  # what is wrong with it is said before anything is started
        open_engine(loading.path, store=loading.store)
    cores = None if on_gpu or address else _share(os.cpu_count() or 1, first, asked, count) * _most(asked) * count
    with open_cluster(address, cores):
        import ray

        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        bounds = asked or _count_gpus(there, count) if on_gpu else asked or Bounds(1, 1)
        if not on_gpu:
            room = there.get("CPU", 0) if cores is None else os.cpu_count() or 1
            threads = min(_share(room, first, asked, count), first.threads or _find_largest_node())
            loadings = {name: replace(each, threads=threads) for name, each in loadings.items()}
            first = next(iter(loadings.values()))
        need = describe_need(first.device, first.threads or 1)
        with open_fleet(loadings, bounds, need, owned=address is None, seconds=seconds, tells=tells) as engines:
            many = bounds.most * first.workers
            yield {name: [RayPainter(engine) for _ in range(many)] for name, engine in engines.items()}


def _most(asked: Bounds | None) -> int:
    return asked.most if asked else 1


def _share(cores: float, first: Loading, asked: Bounds | None, engines: int) -> int:
    """The cores of one replica without a GPU, where there are so many in all."""
    return first.threads or max(1, int(cores) // (_most(asked) * engines))


def _find_largest_node() -> int:
    """The cores of the node that has most of them: a replica must fit on one."""
    return int(max((node.get("CPU", 1) for node in list_nodes()), default=1))


def _count_gpus(there: Mapping[str, float], engines: int) -> Bounds:
    """A replica for each GPU. Raises InputError where an engine would get none."""
    from dreammix_trt.service.fleet import Bounds

    each = int(there.get("GPU", 0)) // engines
    if not each:
        raise InputError(f"--device cuda --ray: the cluster has {there.get('GPU', 0):g} GPUs for {engines} engines")
    return Bounds(each, each)
