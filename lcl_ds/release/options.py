"""Hold what a user chooses about a release."""

from dataclasses import dataclass
from typing import Literal

import torch

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ReleaseOptions:
    """What the command line says about the folder that is written."""

    name: str = ""
    """Of the folder in the model card, where it will be renamed; empty: its own."""
    license: str | None = None
    """Under which the weights are released, as Hugging Face abbreviates it; None: the card says that none is stated."""
    dtype: Dtype = "fp32"
    """Of the weights in the files."""
    shard_size: str = "50GB"
    """Most bytes of a file of weights, as ``5GB``."""


DEFAULTS = ReleaseOptions()
