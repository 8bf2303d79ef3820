"""Texts of a card on a page: whatever a stranger wrote into a field, it is shown and never obeyed."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

SPECIAL = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")  # an underline inside a word means nothing
LINKS = re.compile(r"(?i)(?<=[a-z]):(?=\S)|(?<=www)\.|@")  # what is made a link of without being asked for


def markdown(text: str) -> str:
    """`text` as a part of a line of Markdown: no tag, link, image, code or cell comes of it."""
    escaped = SPECIAL.sub(r"\\\g<0>", html.escape(_one_line(text), quote=False))
    return LINKS.sub(lambda found: f"&#{ord(found[0])};", escaped)


def code(text: str) -> str:
    """`text` in a code span of Markdown."""
    return f"`{_one_line(text).replace('`', chr(39))}`"


def markdown_table(text: str) -> str:
    """Our own table, and the sentences after it, as a card gives them back: the bars between cells stay bars."""
    return "\n".join(_cells(line, markdown) if line[:1] == "|" else _sentence(line) for line in text.splitlines())


def in_html(text: str) -> str:
    """`text` in an element, or in an attribute between quotes."""
    return html.escape(_one_line(text), quote=True)


def html_table(text: str) -> str:
    """What markdown_table shows as HTML; without a table, that nothing was validated."""
    lines = text.splitlines()
    rows = [[in_html(cell) for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    if not rows:
        return "<p>Not validated yet.</p>"
    said = "".join(f"<p>{in_html(line)}</p>" for line in lines if line and line[:1] != "|")
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[2:])
    return f"<table><tr>{head}</tr>{body}</table>{said}"


def _cells(line: str, escape: Callable[[str], str]) -> str:
    return "|".join(f" {escape(cell)} " if cell.strip() else "" for cell in line.split("|"))


def _sentence(line: str) -> str:
    """A line of its own, which is no heading, list, quotation or rule."""
    escaped = markdown(line)
    return re.sub(r"^([-+#=]|\d+(?=[.)]))", lambda found: "".join(f"&#{ord(c)};" for c in found[0]), escaped)


def _one_line(text: str) -> str:
    """Without what would begin a line, hide, or turn the direction of reading around."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
