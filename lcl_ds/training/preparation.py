"""What DeepSpeed has to be told before it is imported."""

import logging
import os
import warnings

import torch


def prepare_for_deepspeed() -> None:
    """Spare users what DeepSpeed says at every start; programs call it before they import DeepSpeed.

    Without a GPU DeepSpeed is told so before it looks for one and warns that it found none. It reports each start at
    length, and torch its own renaming of the collectives that DeepSpeed calls.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    renamed = r".*(all_gather_into_tensor|reduce_scatter_tensor).*"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
