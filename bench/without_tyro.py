"""A pytest plugin (`-p bench.without_tyro`): the GPU's tests run where tyro is not installed.

tests/conftest.py imports the command lines, which want tyro to be there; the GPU's tests call none of them.
"""

import sys
from types import ModuleType

from infer_fast.extras import installed

if not installed("tyro"):
    sys.modules["tyro"] = ModuleType("tyro")
