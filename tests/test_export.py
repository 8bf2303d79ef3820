"""Exported files hold what a student sees."""

import numpy as np
import pytest
import torch
from PIL import Image

from infer_fast.data.distilled import DistilledSet
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError
from infer_fast.export import export
from infer_fast.exported import RECORD
from infer_fast.files import write_bytes
from tests.data.test_distilled import make


@pytest.fixture
def distilled(generator) -> DistilledSet:
    return make(generator)


def expected_pixels(distilled):
    everything = distilled.instances(torch.arange(len(distilled)))
    return distilled.pixels.to_bytes(everything)


def test_png_folders_have_the_published_names_and_the_exact_pixels(distilled, tmp_path):
    assert export(distilled, tmp_path, "png") == len(distilled)
    each = len(distilled) // 3
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
    assert names == [f"new{c:03d}/class{c:03d}_id{i:03d}.png" for c in range(3) for i in range(each)]
    for position, name in enumerate(names):
        pixels = torch.from_numpy(np.asarray(Image.open(tmp_path / name)).copy()).permute(2, 0, 1)
        assert torch.equal(pixels, expected_pixels(distilled)[position])


def test_jpg_folders_are_near(distilled, tmp_path):
    export(distilled, tmp_path, "jpg")
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == len(distilled)
    shown = np.asarray(Image.open(files[0])).astype(float).mean()
    assert shown == pytest.approx(expected_pixels(distilled)[0].float().mean().item(), abs=6)


def test_parquet_reads_back_with_class_names_and_logits(distilled, tmp_path):
    from pyarrow import parquet

    export(distilled, tmp_path / "set", "parquet")
    logits = np.stack(parquet.read_table(tmp_path / "set" / "train.parquet")["logits"].to_pylist())
    assert np.array_equal(logits.astype(np.float16), distilled.logits.reshape(len(distilled), -1).numpy())
    (tmp_path / "set" / "test.parquet").write_bytes((tmp_path / "set" / "train.parquet").read_bytes())
    again = load_dataset("again", tmp_path / "set")
    assert again.classes == distilled.classes
    assert torch.equal(again.train.images, expected_pixels(distilled))
    assert torch.equal(again.train.labels, distilled.labels())


def test_an_unknown_format_is_an_error(distilled, tmp_path):
    with pytest.raises(InferFastError, match="'gif' is not a format"):
        export(distilled, tmp_path, "gif")


@pytest.mark.slow
def test_the_command_line(tmp_path, finished):
    from tests.conftest import run_in

    run = finished[0] / "runs" / "digits"
    done = run_in(tmp_path, "export", "--syn-data-path", str(run), "--output", "out", "--format", "jpg")
    assert done.returncode == 0, done.stderr
    assert "90 images are in out" in done.stdout and len(list((tmp_path / "out").rglob("*.jpg"))) == 90
    assert run_in(tmp_path, "export", "--syn-data-path", "nowhere", "--output", "out").returncode == 1


def test_an_export_takes_the_place_of_the_one_before(generator, tmp_path):
    """Of other sizes and formats: no file of the one before is left, and none is taken for the set's."""
    large, small = make(generator, c=4, k=3, m=2), make(generator, c=3, k=1, m=1)
    (tmp_path / "README.md").write_text("mine")
    for format in ("png", "jpg"):
        export(large, tmp_path, "png")
        export(small, tmp_path, format)
        left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
        images = [f"new{c:03d}/class{c:03d}_id{i:03d}.{format}" for c in range(3) for i in range(2)]
        assert left == [RECORD, "README.md", *images] and not (tmp_path / "new003").exists()
    export(small, tmp_path, "parquet")
    assert (tmp_path / "new000").is_dir()  # another format, which no reader mixes with images


@pytest.mark.parametrize("name", ["new000/mine.png", "new000/class000_id000.png", "other/x.txt", "new000/a/b.png"])
def test_a_folder_with_others_images_is_refused_and_left_alone(distilled, tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InferFastError, match="which no export to this folder wrote"):
        export(distilled, tmp_path, "png")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]
    export(distilled, tmp_path, "parquet")  # among which images are none
    (tmp_path / "test.parquet").write_text("mine")
    with pytest.raises(InferFastError, match="test.parquet"):
        export(distilled, tmp_path, "parquet")


def test_an_export_cut_short_is_completed_by_another(generator, tmp_path, monkeypatch):
    large, small = make(generator, c=4, k=3, m=2), make(generator, c=3, k=1, m=1)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        written = []

        def write(path, data):
            if len(written) == 9:
                raise KeyboardInterrupt
            written.append(path)
            write_bytes(path, data)

        context.setattr("infer_fast.export.write_bytes", write)
        export(large, tmp_path, "png")
    export(small, tmp_path, "png")
    assert len(list(tmp_path.rglob("*.png"))) == len(small)
