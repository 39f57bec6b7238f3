"""Re-exports of `lit_align.data`, where the code is.

`quickstart.py` in this folder prepares the texts, the model and the judge that `configs/quickstart.yaml` uses.
"""

from lit_align.data import *  # noqa: F403
from lit_align.data import __all__  # noqa: F401
