"""Pages made from a stranger's card: every field is shown, and none is obeyed."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from random import Random

import pytest
from markdown_it import MarkdownIt

from infer_fast.files import write_json
from infer_fast.markup import code, html_table, in_html, markdown, markdown_table
from infer_fast.report import write_report
from tests.conftest import SEED
from tests.data.test_distilled import make

HOSTILE = [
    "<script>document.title='owned'</script>",
    "\"><img src=x onerror=\"document.title='owned'\">",
    "' onmouseover='document.title=1",
    "</title></style></pre></table><svg onload=document.title='owned'>",
    "<!--", "-->", "<![CDATA[", "&lt;script&gt;", "&#60;b&#62;",
    "[x](javascript:document.title='owned')", "![x](http://example.com/x.png)", "<javascript:alert(1)>",
    "[x]: javascript:alert(1)", "https://example.com/x", "www.example.com", "me@example.com", "javascript:alert(1)",
    "a | b | c", "|", "`code`", "``` \n<script>document.title='owned'</script>", "**bold** *i* __b__ _i_ ~~s~~",
    "# heading", "a\n# heading\n---\n- list", "1. list", "> quote", "    indented", "\\", "\\|", "\\`x\\`",
    "\r\n\r\n<b>", "\u2028<b>", "\x00\x1b[2J", "\u202egpj.exe", "{{7*7}}", "$(id)", "---", "===", "+ x", "- x",
]  # fmt: skip
TAGS = {
    "html", "meta", "title", "style", "h1", "h2", "p", "img", "table", "tr", "th", "td", "thead", "tbody", "ul", "li",
    "pre", "code", "body", "head",
}  # fmt: skip


CHOSEN = {  # fields of a card that have one of a few words, and are refused with any other
    "optimise", "start", "loader", "engine", "precision", "optimizer", "lr_scheduler", "lr_warmup_method", "mix_type",
    "labels", "crop", "budget", "codec", "label_bits", "compare",
}  # fmt: skip


class Seen(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.others = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        self.text.append(data)

    def handle_comment(self, data):
        self.others.append(data)

    unknown_decl = handle_pi = handle_comment


def combined(random):
    """One of the hostile texts, or several glued together."""
    return random.choice(["", " ", "\n", "|"]).join(random.choices(HOSTILE, k=random.choice([1, 1, 2, 4])))


def rendered(text):
    """Markdown as a page shows it that allows all of HTML, with GitHub's tables, strikethrough."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_shown_as_it_is_written(text):
    shown = "".join(c if c.isprintable() else " " for c in text).strip()
    for page in (
        f"<p>{in_html(text)}</p>",
        rendered(f"begin {markdown(text)} end"),
        rendered(f"begin {code(text)} end"),
    ):
        seen = Seen(page)
        assert set(seen.tags) <= {"p", "code"} and seen.attributes == [] and seen.others == []
        inner = "".join(seen.text).strip().removeprefix("begin ").removesuffix(" end")
        assert inner in (shown, shown.replace("`", "'"))


def test_our_own_table_is_a_table_in_both_and_a_strangers_is_nothing_worse():
    random = Random(SEED)
    for _ in range(300):
        cells = [combined(random) for _ in range(3)]
        text = f"| a | b | c |\n| --- | ---: | --- |\n| {' | '.join(cells)} |\n\n{combined(random)}\n{combined(random)}"
        for page in (rendered(markdown_table(text)), html_table(text)):
            seen = Seen(page)
            assert set(seen.tags) <= TAGS and seen.others == []
            assert all((name, tag) in {("style", "th"), ("style", "td")} for tag, name, _ in seen.attributes), page
    plain = "| a | b |\n| --- | ---: |\n| efficientnet_b0 | 82.00 ± 1.41 |\n\nconvnet, n=2: 1.00 points (FKD) ahead."
    assert markdown_table(plain) == plain


@pytest.fixture
def hostile_set(tmp_path, generator):
    """A whole set whose card has a hostile text in every field that is a text; as many as there are fields."""
    distilled = make(generator, size=8)
    random, card = Random(SEED), json.loads(json.dumps(asdict(distilled.card)))

    def spoil(value, name):
        if isinstance(value, dict):
            return {key: spoil(part, key) for key, part in value.items()}
        if isinstance(value, list):
            return [spoil(part, name) for part in value]
        return combined(random) if isinstance(value, str) and name not in CHOSEN else value

    distilled.save(tmp_path)
    write_json(tmp_path / "card.json", spoil(card, ""))
    return tmp_path


def test_no_tag_and_no_attribute_of_a_page_came_from_a_field(hostile_set):
    write_report(hostile_set)
    page = (hostile_set / "report.html").read_text()
    for seen in (Seen(page), Seen(rendered((hostile_set / "README.md").read_text().split("---\n", 2)[2]))):
        assert set(seen.tags) <= TAGS and seen.others == []
        assert {name for _, name, _ in seen.attributes} <= {
            "lang", "charset", "http-equiv", "content", "alt", "src", "class", "style",
        }  # fmt: skip
        assert all(value.startswith("data:image/png") for _, name, value in seen.attributes if name == "src")
    assert page.count("<meta") == 2 and page.count("<img") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
@pytest.mark.parametrize("guarded", [True, False])
def test_a_browser_runs_no_script_of_a_field(hostile_set, guarded):
    """The page itself, and the page without the policy that would forbid scripts: escaping alone holds."""
    card = json.loads((hostile_set / "card.json").read_text())
    scripts = " ".join(text for text in HOSTILE if "document.title" in text)
    card["dataset"]["name"] = card["teachers"][0]["name"] = card["tasks"][0]["teacher"] = scripts
    write_json(hostile_set / "card.json", {**card, "table": f"| {scripts} |\n| --- |\n| {scripts} |\n\n{scripts}"})
    write_report(hostile_set)
    page = (hostile_set / "report.html").read_text()
    (hostile_set / "page.html").write_text(page if guarded else re.sub(r"<meta http-equiv.*\n", "", page))
    assert page.count("document.title") > 20
    assert title_in_browser(hostile_set / "page.html") != "owned"
    (hostile_set / "control.html").write_text(f"<title>x</title>{HOSTILE[0]}")
    assert title_in_browser(hostile_set / "control.html") == "owned"  # this browser does run scripts


def title_in_browser(page):
    """A page's title after its scripts, if any, have run."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=110, check=False)
    return re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]
