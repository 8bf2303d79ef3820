"""Teachers and students, BatchNorm surgery, and weights in and out."""

from infer_fast.models.build import build
from infer_fast.models.surgery import MatchedTeacher

__all__ = ["MatchedTeacher", "build"]
