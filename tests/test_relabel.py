"""Static labels: the average of the teachers' logits on what a student will see."""

import torch

import infer_fast
from infer_fast.data.distilled import DistilledSet, quantise
from infer_fast.models import build
from infer_fast.models.teacher import Teacher
from infer_fast.relabel import relabel
from infer_fast.students.labels import averaged_logits


def teachers():
    return [
        Teacher(n, build(n, 4, (8, 8), seed=i).eval(), 0.0, None, "") for i, n in enumerate(("convnet", "convnet-silu"))
    ]


def test_labels_are_the_averaged_logits_of_stored_instances(tiny_dataset, generator):
    base = torch.stack([tiny_dataset.train.images[tiny_dataset.train.labels == c][:2] for c in range(4)])
    compensators = quantise(torch.randn(3, 2, 3, 8, 8, generator=generator), tiny_dataset.pixels.std)
    empty = torch.zeros(4, 2, 4, 4, dtype=torch.float16)
    distilled = relabel(DistilledSet(base, compensators, empty, tiny_dataset.pixels, tiny_dataset.classes), teachers())
    instances = torch.stack([distilled[i][0] for i in range(len(distilled))])
    with torch.no_grad():
        expected = sum(t.network(instances) for t in teachers()) / 2
    torch.testing.assert_close(distilled.logits.reshape(-1, 4).float(), expected, atol=2e-3, rtol=2e-3)


def test_real_images_get_the_same_kind_of_label(tiny_dataset):
    logits = averaged_logits(teachers(), lambda p: tiny_dataset.pixels.normalise(tiny_dataset.test.at(p)), 24)
    assert logits.shape == (24, 4) and torch.equal(logits, logits.half().float())


def test_renewed_labels_void_what_was_measured_with_the_old_ones(call_module, copied_run, small_flags):
    folder = copied_run
    table = (folder / "table.md").read_text()
    before = (folder / "distilled.safetensors").read_bytes()
    assert "same labels as before" in call_module("relabel").stdout
    assert (folder / "distilled.safetensors").read_bytes() == before
    distilled = infer_fast.load(folder)
    distilled.logits.zero_()
    distilled.publish(distilled.made, folder)
    for name in ("curve.json", "curve.png", "tsne.png"):
        (folder / name).write_text("of the old labels")
    assert "labels changed" in call_module("relabel").stdout
    assert (folder / "distilled.safetensors").read_bytes() == before
    card = infer_fast.load(folder).made  # whose hash fits
    assert card.results == () and card.table is None
    left = {path.name for path in folder.iterdir()}
    assert not left & {"table.md", "results.json", "curve.json", "curve.png", "tsne.png"}
    for page in ("README.md", "report.html"):
        assert "Not validated yet" in (folder / page).read_text()
    judged = call_module("distill", *small_flags)
    assert judged.returncode == 0 and (folder / "table.md").read_text() == table
