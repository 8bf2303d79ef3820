"""The fused operations of dataset distillation, each with a plain PyTorch reference and faster backends."""

from infer_fast.ops.adam import adam_
from infer_fast.ops.bn_match import bn_match, bn_match_statistics, bn_match_twice
from infer_fast.ops.compose import Quantised, compose
from infer_fast.ops.enlarge import enlarged, enlarging
from infer_fast.ops.max_pool import max_pool
from infer_fast.ops.objective import lane_loss
from infer_fast.ops.perturb import perturb_
from infer_fast.ops.scale_shift import scale_shift

__all__ = [
    "Quantised",
    "adam_",
    "bn_match",
    "bn_match_statistics",
    "bn_match_twice",
    "compose",
    "enlarged",
    "enlarging",
    "lane_loss",
    "max_pool",
    "perturb_",
    "scale_shift",
]
