"""What README.md and the pages of docs/ show: snippets pass a type checker, commands exist, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
FIRST, LAST = README.index("```"), README.index("## What you get")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> dict[int, str]:
    """The code blocks of a language, by the line on which each begins."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return {text.count("\n", 0, block.start(1)): block[1] for block in found}


@pytest.mark.slow
def test_every_python_snippet_passes_the_type_checker(tmp_path: Path) -> None:
    """As a user's file would, each on its own."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy")
    files = []
    for page in (ROOT / "README.md", *DOCS):
        text = page.read_text(encoding="utf-8")
        found = blocks(text, "python")
        assert len(found) == text.count("```python"), f"{page}: a block that is not closed"
        for line, code in found.items():
            files.append(tmp_path / f"{page.stem.replace('-', '_').lower()}_{line}.py")
            files[-1].write_text("\n" * line + code, encoding="utf-8")  # so that mypy names the line of the page
    assert {file.stem.rsplit("_", 1)[0] for file in files} >= {"readme", "app", "gpu"}
    # The project's configuration for what is imported; only the snippets' own errors count.
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]
    command += ["--follow-imports", "silent", "--cache-dir", str(tmp_path / "cache"), *map(str, files)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def commands(page: Path) -> list[list[str]]:
    """The shell lines of a page as words, comments left out; a backslash joins lines."""
    text = "\n".join(blocks(page.read_text(encoding="utf-8"), "sh").values()).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_only_commands_and_options_that_exist_are_shown() -> None:
    shown: dict[tuple[str, ...], str] = {}
    lines = [words[1:] for page in PAGES for words in commands(page) if words[0] == "dreammix-trt"]
    assert len(lines) >= 12
    for words in lines:
        command = tuple(words[: 2 if words[0] == "store" else 1])
        if command not in shown:
            asked = [sys.executable, "-m", "dreammix_trt", *command, "--help"]
            wide = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1"}
            helped = subprocess.run(asked, capture_output=True, text=True, check=False, env=wide)
            assert helped.returncode == 0, command
            shown[command] = helped.stdout
        for option in words:
            assert not option.startswith("--") or option in shown[command], f"{command} {option}"


def test_only_extras_and_scripts_that_exist_are_shown() -> None:
    import tomllib

    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {
        extra.strip()
        for page in PAGES
        for group in re.findall(r"(?:\.|\.whl|dreammix-trt)\[([\w, ]+)\]", page.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert {"rtx", "cuda", "export", "train"} <= named <= extras
    helped = subprocess.check_output([sys.executable, ROOT / "dev.py", "--help"], text=True)
    for page in PAGES:
        for words in commands(page):
            if words[:2] == ["python", "dev.py"]:
                assert words[2] in helped, f"{page}: dev.py {words[2]}"
            elif words[0] == "python" and words[1] != "-m":
                assert (ROOT / words[1]).is_file(), f"{page}: {words[1]}"


def test_ten_minutes_are_enough() -> None:
    """First the picture, then exactly two commands; all of it in 150 lines."""
    assert len(README.splitlines()) <= 150
    assert README.index("](docs/demo.jpg)") < FIRST
    (first,) = blocks(README[:LAST], "sh").values()
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["python dev.py demo", "python dev.py test"]
    assert [words for words in commands(ROOT / "README.md") if words[1:2] == ["dev.py"]] == [
        ["python", "dev.py", "demo"], ["python", "dev.py", "test"],
    ]  # fmt: skip
    with Image.open(ROOT / "docs" / "demo.jpg") as sheet:
        assert sheet.width >= 1000 and sheet.height >= 700


def test_the_figures_are_those_of_the_measurements() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "full_size.json").read_text())["rows"]
    measured = {row["metric"]: row["value"] for row in rows}
    weights = {name: size for name, size in measured.items() if re.fullmatch(r"\w+: ONNX \[MiB\]", name)}
    for told in (
        f"{measured['whole set: wall [s]'] / 60:.0f} minutes",
        f"{measured['second subject: wall [s]']:.0f} seconds",
        f"{sum(size for name, size in weights.items() if name.startswith('unet')) / 1024:.1f} GiB of weights",
    ):
        assert told in README.replace("\n", " "), told
    checkpoints = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8").replace("\n", " ")
    store = f"{measured['store: all parts [GiB]']:.1f} GiB"
    assert store in checkpoints
    assert (
        f"{measured['second subject: wall [s]']:.1f} s and {measured['second subject: bytes [MB]']:.0f} MB"
        in checkpoints
    )
    # plans and the weights beside them; with the float32 twins of the VAE, 334 MB
    assert 11 <= sum(weights.values()) / 1024 < 12 and "12 GiB for the engine" in README


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not page.parent.joinpath(link.split("#")[0] or page.name).exists()] == []
    for target, _, anchor in (link.partition("#") for link in links if "#" in link):
        heads = re.findall(r"^#+ (.*)$", page.parent.joinpath(target or page.name).read_text("utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}, anchor


class _Fetched(HTMLParser):
    """What a page has the browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(given.get("src") or "")
        elif tag == "link" and given.get("rel") in ("stylesheet", "preload", "preconnect"):
            self.found.append(given.get("href") or "")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=quiet)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {page.relative_to(ROOT / "docs").with_suffix("") for page in DOCS} <= {
        page.relative_to(tmp_path / "site").with_suffix("") for page in (tmp_path / "site").rglob("*.html")
    }
    for page in (tmp_path / "site").rglob("*.html"):
        parser = _Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert [each for each in parser.found if "//" in each] == [], page
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in (
        "dreammix.DreamMix.inpaint",
        "request.Request",
        "RequestQueue.submit",
        "lora.train_lora",
        "InputError",
    ):
        assert re.search(rf'id="dreammix_trt\.[\w.]*{re.escape(name)}"', api), f"the API page lacks {name}"
    assert "<code>guidance_scale</code>: 0..100" in api, "parameters are no list"
