"""What pip installs: every file of the package, whether or not the checkout has symbolic links; nothing twice."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = "dreammix_trt"
LEFT_OUT = (".ci/", ".github/")  # of the sdist


def ask_git(*arguments: str) -> list[str]:
    """What git says about the checkout, split at its zeros; skips where there is no git or no checkout."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.skip(f"no git checkout: {ran.stderr.strip()}")
    return [each for each in ran.stdout.split("\0") if each]


@pytest.fixture(scope="module")
def links() -> dict[str, str]:
    """The links in the package and the top-level folders they stand for, as git knows them."""
    staged = (each.split("\t") for each in ask_git("ls-files", "-sz"))
    return {path: Path(path).name for facts, path in staged if facts.startswith("120000 ")}


@pytest.fixture(scope="module")
def sources(links: dict[str, str]) -> set[str]:
    """Every file of the working tree that git does not ignore, links left out."""
    listed = set(ask_git("ls-files", "-coz", "--exclude-standard")) - set(links)
    return {path for path in listed if (ROOT / path).is_file()}


@pytest.fixture(scope="module")
def package_files(links: dict[str, str], sources: set[str]) -> set[str]:
    """What an installed package has to hold."""
    floors = {folder: link for link, folder in links.items()}
    moved = {
        f"{floors[top]}{slash}{rest}" for top, slash, rest in (each.partition("/") for each in sources) if top in floors
    }
    return moved | {path for path in sources if path.startswith(f"{PACKAGE}/")}


@pytest.fixture
def plain_clone(links: dict[str, str], sources: set[str], tmp_path: Path) -> Path:
    """This working tree as git checks it out without symbolic links: a real clone, with what is not committed yet."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "-c", "core.symlinks=false", "clone", "-q", ROOT, clone], check=True)
    committed = subprocess.check_output(["git", "ls-files", "-z"], cwd=clone, text=True)
    for path in set(filter(None, committed.split("\0"))) - sources - set(links):
        (clone / path).unlink()
    for path in sources:
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, clone / path)
    for link in links:
        assert (clone / link).is_file() and not (clone / link).is_symlink()
    return clone


def build(hook: str, project: Path, out: Path) -> Path:
    """Call a hook of the project's own build back end, as pip does, without a compiler; returns what it built."""
    for tool in ("scikit_build_core", "nanobind"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"needs {tool}")
    code = f"import build_backend; print(build_backend.{hook}({str(out)!r}, {{'wheel.cmake': 'false'}}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return out / ran.stdout.split()[-1]


def packed_files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".dist-info/" not in name]


@pytest.mark.slow
def test_a_checkout_without_links_makes_a_complete_wheel(
    plain_clone: Path, package_files: set[str], tmp_path: Path
) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["-C", "wheel.cmake=false", "-w", str(tmp_path), "--disable-pip-version-check"]
    ran = subprocess.run(command, cwd=plain_clone, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "dreammix_trt/core/errors.py" in package_files
    assert sorted(packed_files(wheel)) == sorted(package_files)


@pytest.mark.slow
def test_this_checkout_makes_the_same_wheel(package_files: set[str], tmp_path: Path) -> None:
    assert sorted(packed_files(build("build_wheel", ROOT, tmp_path))) == sorted(package_files)


@pytest.mark.slow
def test_an_sdist_has_each_file_once_and_makes_a_complete_wheel(
    sources: set[str], package_files: set[str], tmp_path: Path
) -> None:
    with tarfile.open(build("build_sdist", ROOT, tmp_path)) as archive:
        members = archive.getmembers()
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert all(member.isfile() for member in members)
    (project,) = (tmp_path / "unpacked").iterdir()
    found = Counter(member.name.removeprefix(f"{project.name}/") for member in members)
    expected = {path for path in sources if not path.startswith(LEFT_OUT)} | {"PKG-INFO"}
    assert found == Counter(expected)
    assert sorted(packed_files(build("build_wheel", project, tmp_path))) == sorted(package_files)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="junctions are not links")
def test_an_editable_install_makes_the_links_it_needs(plain_clone: Path, links: dict[str, str], tmp_path: Path) -> None:
    with zipfile.ZipFile(build("build_editable", plain_clone, tmp_path)) as archive:
        finder = archive.read(f"_editable_skbc_{PACKAGE}.py").decode()
    for link, folder in links.items():
        assert (plain_clone / link).readlink() == Path("..", folder)
        module = plain_clone / link / "__init__.py"
        assert repr(str(module)) in finder, "modules must be found through the links, as mypy and unbuilt runs do"


def test_the_stub_says_what_the_module_has(tmp_path: Path) -> None:
    """As the build makes it (cpp_ext/CMakeLists.txt): every public name, and no import that only works at build."""
    module = pytest.importorskip(f"{PACKAGE}._cpp")
    pytest.importorskip("nanobind")
    stub, folder, patterns = tmp_path / "_cpp.pyi", Path(module.__file__).parent, ROOT / "cpp_ext" / "stub.txt"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "_cpp"]
    command += ["-i", str(folder), "-p", str(patterns), "-o", str(stub)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    tree = ast.parse(stub.read_text())
    said = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    said |= {ast.unparse(node.target) for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert said == {name for name in dir(module) if not name.startswith("_")}
    assert not [
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "_cpp" in str(node.module)
    ]
