"""The build back end that pip calls: scikit-build-core, and before an editable install the package's links.

Wheels and sdists hold the floors' real folders (`[tool.scikit-build]` in pyproject.toml). An editable install is the
tree itself, so there the links have to be links.
"""

from __future__ import annotations

from typing import Any

from scikit_build_core.build import build_editable as _build_editable
from scikit_build_core.build import (
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from dev import link_floors

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
    "get_requires_for_build_wheel", "prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel",
]  # fmt: skip


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Make the links that are missing (an sdist has none, git may have written them as text), then build."""
    link_floors()
    return _build_editable(wheel_directory, config_settings, metadata_directory)
