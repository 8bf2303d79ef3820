"""infer_fast: dataset distillation (INFER, DWA, SRe2L) at the speed of the hardware.

python -m infer_fast.distill              # digits, the whole way, in under two minutes on two cores
python -m infer_fast.distill --help       # every setting
infer_fast.load("runs/digits")            # the distilled set as a torch Dataset of (instance, logits, class)
"""

from infer_fast.process import begin

begin()  # before torch, which takes seconds to be imported

from infer_fast.data.distilled import DistilledSet, load  # noqa: E402
from infer_fast.synthesis import solve  # noqa: E402

__version__ = "0.1.0"
__all__ = ["DistilledSet", "__version__", "load", "solve"]
