"""The pages: every link leads somewhere, every command that they name is there, the map of the house is whole."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MOST_WORDS = 1500  # of the README

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str) -> list[str]:
    """Code that stands in lines of its own."""
    return re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without the code in lines of its own."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """All code, a line or a piece within a line each."""
    own_lines = [line.strip() for block in blocks(text) for line in block.splitlines()]
    return own_lines + re.findall(r"`([^`\n]+)`", prose(text))


def links(text: str) -> list[str]:
    """Where links and images lead, those within the page and the repository."""
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "code", prose(text)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings: lower case, hyphens for spaces, no other punctuation, equal ones counted."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", prose(text), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def broken_links(page: Path) -> list[str]:
    """The links of a page that lead to no file, or to no heading in it."""
    broken = []
    for target in links(page.read_text()):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if not there.exists() or (anchor and anchor not in anchors(there.read_text())):
            broken.append(target)
    return broken


def missing_commands(text: str) -> list[str]:
    """Modules and make targets that a page names and that are not there."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"-m (infer_fast\.[a-z_.]*[a-z_])", text)) | set(re.findall(r"\bbench\.[a-z_]+\b", text))
    modules = {name for name in named if not (ROOT / f"{name.replace('.', '/')}.py").is_file()}
    made = {target for line in code(text) for target in re.findall(r"^(?:\w+=\S+ )*make ([a-z]+)", line)}
    return sorted(modules | {f"make {target}" for target in made - targets})


def rooms(page: str) -> list[str]:
    """The files that the tables of the architecture page tell of: the code in their first column."""
    return [
        path
        for row in re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE)
        for path in re.findall(r"`([^`]+/[^`]+\.\w+)`", row)
    ]


@every_page
def test_every_link_and_picture_leads_to_something_that_is_there(page):
    assert broken_links(page) == []


@every_page
def test_every_command_that_is_named_is_there(page):
    assert missing_commands(page.read_text()) == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


def test_the_map_of_the_house_names_every_module_and_nothing_else():
    page = (ROOT / "docs" / "architecture.md").read_text()
    told = [path for path in rooms(page) if path.split("/")[0] in ("infer_fast", "kernels", "csrc", "bench")]
    assert [path for path in told if not (ROOT / path).is_file()] == []
    assert [path for path, count in Counter(told).items() if count > 1] == []
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "infer_fast").rglob("*.py")}
    assert modules - set(told) == set()


def test_what_leads_nowhere_is_noticed(tmp_path):
    (tmp_path / "other.md").write_text("# One: a `b_c`\n\n## Twice\n\n## Twice\n\n```\n# No heading\n```\n")
    good = "[a](other.md) [b](other.md#one-a-b_c) [c](other.md#twice-1) [d](#here) [e](https://x.org/y)"
    bad = ["gone.md", "other.md#no-heading", "other.md#twice-2", "#there", "gone.png"]
    page = tmp_path / "page.md"
    page.write_text(
        f"# Here\n\n{good} `[f](code.md)`\n\n```\n[g](code.md)\n```\n\n[a\nb](gone.md) [`h`](other.md#no-heading)"
        " [i](other.md#twice-2) [j](#there) ![a picture](gone.png)\n"
    )
    assert broken_links(page) == bad


def test_a_command_that_is_not_there_is_noticed():
    text = "Run `python -m infer_fast.brew` or `bench.tea`, not make sense.\n```\nSEED=1 make coffee\nmake test\n```\n"
    assert missing_commands(text) == ["bench.tea", "infer_fast.brew", "make coffee"]
