"""The build back end that pip calls: scikit-build-core, the package's links, and nvcc where it is asked for.

Wheels and sdists hold the floors' real folders (`[tool.scikit-build]` in pyproject.toml). An editable install is the
tree itself, so there the links have to be links.

`-C cmake.define.DREAMMIX_CUDA=ON` asks for CUDA kernels. Where no nvcc is found, pip then brings NVIDIA's compiler as
packages into the environment it builds in (270 MB), and throws them away with it. No CUDA toolkit has to be installed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from scikit_build_core.build import build_editable as _build_editable
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from scikit_build_core.build import build_wheel as _build_wheel
from scikit_build_core.build import get_requires_for_build_editable as _requires_for_editable
from scikit_build_core.build import get_requires_for_build_wheel as _requires_for_wheel

from dev import SETTINGS, find_nvcc, link_floors

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
    "get_requires_for_build_wheel", "prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel",
]  # fmt: skip

Settings = dict[str, Any] | None

STABLE_ABI = "cp312"  # the first that nanobind can build for; before that, one wheel a version

# One release of CUDA, the oldest whose drivers we ask for (`DRIVER_NEEDED` in engine/hardware.py): what a newer nvcc
# makes of PTX needs a newer driver.
CUDA_PACKAGES = [
    f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
]  # fmt: skip


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What pip installs to build a wheel."""
    return [*_requires_for_wheel(config_settings), *cuda_requirements(config_settings)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """What pip installs to build an editable wheel."""
    return [*_requires_for_editable(config_settings), *cuda_requirements(config_settings)]


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:  # fmt: skip
    """Build a wheel, with NVIDIA's compiler packages where `get_requires_for_build_wheel` asked for them."""
    use_packaged_nvcc(config_settings)
    return _build_wheel(wheel_directory, add_stable_abi(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:  # fmt: skip
    """Make the links that are missing (an sdist has none, git may have written them as text), then build."""
    link_floors()
    use_packaged_nvcc(config_settings)
    return _build_editable(wheel_directory, config_settings, metadata_directory)


def add_stable_abi(config_settings: Settings) -> dict[str, Any]:
    """The settings, with one wheel for Python 3.12 and later where it holds the extension. Pure ones have no tag."""
    settings = config_settings or {}
    compiles = settings.get("wheel.cmake", os.environ.get("SKBUILD_WHEEL_CMAKE", "true"))
    return settings if str(compiles).lower() in ("false", "0", "off") else {"wheel.py-api": STABLE_ABI, **settings}


def cuda_requirements(config_settings: Settings) -> list[str]:
    """The compiler's packages, where CUDA kernels are asked for and no nvcc is found."""
    return CUDA_PACKAGES if wants_cuda(config_settings) and find_nvcc() is None else []


def wants_cuda(config_settings: Settings) -> bool:
    """Whether the build must have CUDA kernels: DREAMMIX_CUDA is ON in pip's settings or in SKBUILD_CMAKE_DEFINE."""
    given = (config_settings or {}).get("cmake.define.DREAMMIX_CUDA")
    if given is None:
        defined = dict(each.partition("=")[::2] for each in os.environ.get(SETTINGS, "").split(";"))
        given = defined.get("DREAMMIX_CUDA", "")
    return str(given).upper() in ("ON", "1", "TRUE", "YES")


def use_packaged_nvcc(config_settings: Settings) -> None:
    """Name the packages' nvcc to CMake where no other is found. CMake says the rest: ON fails without a compiler."""
    spec = importlib.util.find_spec("nvidia")
    if not wants_cuda(config_settings) or find_nvcc() is not None or spec is None:
        return
    for folder in spec.submodule_search_locations or ():
        for nvcc in sorted(Path(folder).glob("cu*/bin/nvcc*")):
            if nvcc.name not in ("nvcc", "nvcc.exe"):
                continue
            toolkit = nvcc.parent.parent
            if os.name != "nt" and not (toolkit / "lib64").exists():
                (toolkit / "lib64").symlink_to("lib")  # where nvcc.profile looks for the static CUDA runtime
            os.environ["CUDACXX"] = str(nvcc)
            return
