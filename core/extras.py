"""Optional packages: asked for before any work is done that would be in vain without them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from dreammix_trt.core.errors import MissingExtraError

#: What training imports; the extra `train` brings it.
TRAINING = ("torch", "diffusers", "transformers", "peft")

#: What the service imports; the extra `serve` brings it.
SERVING = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")

#: What work on a cluster imports; the extra `ray` brings it, and that of the service.
CLUSTER = ("ray",)


def list_missing(packages: Iterable[str]) -> list[str]:
    """Those of these packages that are not installed. Imports none of them."""
    return [name for name in packages if not _is_there(name)]


def require_training() -> None:
    """Raise MissingExtraError, with what to install, unless everything that training imports is installed."""
    _require(TRAINING, "training", "train")


def require_serving() -> None:
    """Raise MissingExtraError, with what to install, unless everything that the service imports is installed."""
    _require(SERVING, "the service", "serve")


def require_cluster() -> None:
    """Raise MissingExtraError, with what to install, unless Ray is installed."""
    _require(CLUSTER, "work on a cluster", "ray")


def _require(packages: Iterable[str], what: str, extra: str) -> None:
    missing = list_missing(packages)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(
            f"{', '.join(missing)} {verb} not installed, {what} needs it: pip install 'dreammix-trt[{extra}]'"
        )


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
