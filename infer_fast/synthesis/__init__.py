"""What is optimised (problem), the loop that does it (solver), its views and the plan of its tasks."""

from infer_fast.synthesis.solver import NonFiniteLossError, solve
from infer_fast.synthesis.views import Views, draw_views

__all__ = ["NonFiniteLossError", "Views", "draw_views", "solve"]
