"""The picture and the pages."""

import pytest
from PIL import Image

from infer_fast.files import read_json, write_json


@pytest.mark.slow
def test_preview_card_and_page(run_module, copied_run):
    folder = copied_run
    with Image.open(folder / "preview.png") as picture:
        assert picture.width > 300 and picture.height > 700
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100
    card = (folder / "README.md").read_text()
    assert "task_categories: [image-classification]" in card and "| convnet | distilled |" in card
    page = (folder / "report.html").read_text()
    assert page.count("<tr>") == 1 + 5 + 1 + 6 and "data:image/png;base64," in page
    stored = read_json(folder / "card.json")
    stored["dataset"]["name"] = "<script>"
    write_json(folder / "card.json", stored)
    assert run_module("report").returncode == 0
    assert "<script>" not in (folder / "report.html").read_text()
