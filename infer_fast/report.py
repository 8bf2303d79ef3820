"""Pictures and pages a person can judge a distilled set by.

python -m infer_fast.report --syn-data-path runs/digits      # preview.png, README.md and report.html, made again
"""

from __future__ import annotations

import base64
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from infer_fast import cli
from infer_fast.data.distilled import DistilledSet, load
from infer_fast.files import write_bytes, write_text
from infer_fast.markup import code, html_table, in_html, markdown, markdown_table
from infer_fast.ops.compose import Quantised

PREVIEW_CLASSES = 10
TILE = 104  # pixels a shown image is scaled to, at least
GAP = 4


def write_preview(distilled: DistilledSet, path: Path) -> None:
    """A PNG: one row per class (at most 10) with its base image and its instances, under the compensators (scaled)."""
    classes, k = distilled.base.shape[:2]
    shown = range(min(classes, PREVIEW_CLASSES))
    side = _side(distilled)
    views = distilled.views_per_base
    columns = ["base image", *[t.name for t in distilled.made.teachers][: views - 1]]
    header = 18
    width = 90 + len(columns) * (side + GAP)
    picture = Image.new("RGB", (width, 2 * header + (side + GAP) * (len(shown) + 1)), "white")
    draw = ImageDraw.Draw(picture)
    for column, name in enumerate(columns):
        draw.text((90 + column * (side + GAP), 2), _short(name, side), fill="black")
    if distilled.compensators is not None:
        draw.text((2, header + side // 2), "compensator", fill="black")
        for m in range(views - 1):
            picture.paste(_tile(_stretched(distilled.compensators, m), side), (90 + (m + 1) * (side + GAP), header))
    for row, c in enumerate(shown):
        top = 2 * header + (row + 1) * (side + GAP) - header
        draw.text((2, top + side // 2), _short(distilled.classes[c], 84), fill="black")
        positions = torch.arange(views) + c * k * views
        pixels = distilled.pixels.to_bytes(distilled.instances(positions))
        for column in range(len(columns)):
            picture.paste(_tile(pixels[column], side), (90 + column * (side + GAP), top))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def write_dataset_card(distilled: DistilledSet, path: Path) -> None:
    """The folder's README.md: a Hugging Face dataset card made from card.json."""
    card = distilled.made
    size, version = card.bytes, markdown(card.versions.infer_fast)
    coded = "" if distilled.coded is None else f" The images are coded: {_coding(distilled)}."
    teachers = "\n".join(f"- {markdown(t.name)}: test accuracy {t.accuracy:.2f} %" for t in card.teachers)
    write_text(
        path,
        f"""---
task_categories: [image-classification]
tags: [dataset-distillation, infer_fast]
---

# {markdown(card.dataset.name)}, distilled

{len(distilled):,} training instances from {size.images:,} bytes of images ({size.ratio:.1f} times smaller than
the {size.dataset:,} bytes of the training split) and {size.labels:,} bytes of soft labels. Made with infer_fast
{version}, recipe {code(card.recipe_name)}, {distilled.base.shape[1]} base images per class.{coded}

Teachers:

{teachers}

```python
import infer_fast

distilled = infer_fast.load("this folder")
instance, logits, label = distilled[0]
```

{markdown_table(card.table or "Not validated yet.")}
""",
    )


def write_page(distilled: DistilledSet, folder: Path) -> None:
    """report.html in `folder`: the preview, the table and the losses, in one file without outside parts."""
    card = distilled.made
    preview = base64.b64encode((folder / "preview.png").read_bytes()).decode()
    losses = "".join(
        f"<tr><td>{in_html(t.teacher)}</td><td>{t.index}</td><td>{t.first_loss:.3f}</td><td>{t.last_loss:.3f}</td></tr>"
        for t in card.tasks
    )
    title = f"{in_html(card.dataset.name)}, distilled"
    coded = "" if distilled.coded is None else f" The images are coded: {_coding(distilled)}."
    write_text(
        folder / "report.html",
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>body{{font:15px sans-serif;max-width:70em;margin:2em auto}}td,th{{padding:.2em .8em;border-bottom:1px solid #ccc;
text-align:left}}pre{{background:#f4f4f4;padding:1em;overflow:auto}}</style>
<h1>{title}</h1>
<p>{card.bytes.images:,} bytes of images, {card.bytes.labels:,} bytes of soft labels,
{len(distilled):,} instances.{coded}</p>
<img alt="base images, compensators and instances" src="data:image/png;base64,{preview}">
<h2>Students</h2>
{html_table(card.table or "")}
<h2>Tasks</h2>
<table><tr><th>teacher</th><th>index</th><th>first loss</th><th>last loss</th></tr>{losses}</table>
</html>
""",
    )


def write_report(folder: Path) -> None:
    """preview.png, README.md and report.html for the distilled set in `folder`."""
    distilled = load(folder)
    write_preview(distilled, folder / "preview.png")
    write_dataset_card(distilled, folder / "README.md")
    write_page(distilled, folder)


def _coding(distilled: DistilledSet) -> str:
    """How the images of a coded set are stored, and what the whole file weighs where that was counted."""
    coded, weight = distilled.coded, distilled.made.bytes
    assert coded is not None
    how = "raw" if coded.codec.name == "raw" else f"{in_html(coded.codec.name)} of quality {coded.codec.quality}"
    colour = ", grey" if coded.channels == 1 else ""
    whole = (
        "" if weight.file is None else f"; the whole file has {weight.file:,} bytes of a budget of {weight.budget:,}"
    )
    return f"{how}{colour}{whole}"


def _stretched(compensators: Quantised, teacher: int) -> torch.Tensor:
    """The teacher's first compensator, uint8 (3, H, W), around mid-grey and scaled to fill the range."""
    values, scale, offset = (t[teacher, 0] for t in compensators)
    dense = values.float() * scale.float()[:, None, None] + offset.float()[:, None, None]
    strongest = dense.abs().max().clamp(min=1e-6)
    return ((dense / strongest + 1) * 127.5).round().to(torch.uint8)


def _tile(pixels: torch.Tensor, side: int) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return image.resize((side, side), Image.Resampling.NEAREST)


def _side(distilled: DistilledSet) -> int:
    size = max(distilled.base.shape[-2:])
    return size * max(1, -(-TILE // size))


def _short(text: str, pixels: int) -> str:
    letters = pixels // 6
    shown = "".join(c if c.isprintable() else " " for c in text[: letters + 1])
    return shown if len(text) <= letters else shown[: letters - 1] + "."


@dataclass(frozen=True)
class ReportOptions:
    """Flags of python -m infer_fast.report."""

    syn_data_path: Path = Path("runs/digits")
    """the distilled set's folder"""


def _main(args: list[str]) -> None:
    options = cli.parse(ReportOptions, ReportOptions(), args, "python -m infer_fast.report", "Pictures and pages.")
    write_report(options.syn_data_path)
    print(f"Wrote {options.syn_data_path / 'preview.png'} and {options.syn_data_path / 'report.html'}")


if __name__ == "__main__":
    sys.exit(cli.run(_main))
