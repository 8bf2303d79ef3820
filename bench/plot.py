"""Pictures of the committed results: how many times faster than published, and how near the hardware's limit.

python -m bench.plot                              # every distill-*.json and ops-*.json in bench/results
python -m bench.plot bench/results/ops-cpu.json --output DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
COLOURS = {"ratio": "#2a6f97", "floor": "#a9c9dd", "share": "#bc6c25"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON files (default: all that can be drawn)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the pictures")
    options = parser.parse_args()
    found = options.results or sorted([*RESULTS.glob("distill-*.json"), *RESULTS.glob("ops-*.json")])
    for path in found:
        print(draw(path, options.output))


def draw(path: Path, folder: Path) -> Path:
    """One PNG of a result: a bar of the ratio and a bar of the share for every row that has both."""
    result = json.loads(path.read_text())
    bars = [bar for row in result["rows"] if (bar := bar_of(row)) is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.2 + 0.32 * len(bars)), sharey=True)
    places = range(len(bars))
    if any(b["floor"] for b in bars):
        left.barh(places, [b["floor"] or 0 for b in bars], color=COLOURS["floor"], label="no BatchNorm at all")
    left.barh(places, [b["ratio"] for b in bars], height=0.5, color=COLOURS["ratio"], label="ours")
    left.set_yticks(places, [b["label"] for b in bars], fontsize=8)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("times faster than the published way")
    left.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    left.invert_yaxis()
    right.barh(places, [100 * b["share"] for b in bars], height=0.5, color=COLOURS["share"])
    right.set_xlabel(f"% of the hardware's measured limit ({bars[0]['limit']})")
    machine = result["machine"]
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}, {machine['date']}", fontsize=9)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{path.stem}.png"
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def bar_of(row: dict) -> dict | None:
    """What is drawn of a row, or None if it has no ratio or no share."""
    if row.get("share of matrix rate") is not None and row.get("published / best") is not None:
        label, ratio, floor = f"{row['teacher']}, {row['case']}", row["published / best"], row["published / floor"]
        return {"label": label, "ratio": ratio, "floor": floor, "share": row["share of matrix rate"], "limit": "matmul"}
    if row.get("share of copy bandwidth") is not None:
        label = f"{row['op']} {row['shape']} {row['dtype']} {row['layout']}"
        share = row["share of copy bandwidth"]
        return {"label": label, "ratio": row["published / ours"], "floor": None, "share": share, "limit": "copy"}
    return None


if __name__ == "__main__":
    main()
