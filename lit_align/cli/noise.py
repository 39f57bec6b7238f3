"""Start-up messages of other packages that nobody can act on; they are not printed."""

import logging
import re
import warnings

# Each with its reason.
WARNINGS = [
    r"Found \d+ module\(s\) in eval mode",  # the reference is, on purpose
    r".*does not have many workers",  # batches come from memory: workers would only cost time
    r".*`tensorboardX` has been removed",  # the CSV logger is wanted
    r"Total length of `list` across ranks is zero",  # validation data are missing on purpose
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and torch
    r"`is_gradient_checkpointing` is deprecated",  # between peft and transformers
    r"Checkpoint directory .* exists and is not empty",  # of a run that resumes
    r"Glyph \d+ .* missing from font",  # a report's reader has fonts of their own
    r"predict returned None",  # `Predictions` writes the responses to a file
]
# Advertisements, and a device that nobody expects.
TIPS = re.compile(r"litlogger|litmodels|TPU available: False")


def is_not_a_tip(record: logging.LogRecord) -> bool:
    return not TIPS.search(record.getMessage())


def quiet() -> None:
    """Filter these messages out."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(logger).addFilter(is_not_a_tip)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises another package for CPUs
