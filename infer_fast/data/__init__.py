"""Datasets in, the distilled set in and out, and the batches that networks are trained on."""
