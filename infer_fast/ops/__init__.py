"""The fused operations of dataset distillation, each with a plain PyTorch reference and faster backends."""

from infer_fast.ops.bn_match import bn_match
from infer_fast.ops.compose import Quantised, compose
from infer_fast.ops.perturb import perturb_

__all__ = ["Quantised", "bn_match", "compose", "perturb_"]
