"""A door: the data modules' code is in `lit_align/data/`. These names are the same objects.

`quickstart.py` beside this file prepares the real texts, model and judge that `configs/quickstart.yaml` uses.
"""

from lit_align.data import *  # noqa: F403
from lit_align.data import __all__  # noqa: F401
