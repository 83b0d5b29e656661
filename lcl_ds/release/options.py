"""Hold what a user chooses about a release."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lcl_ds.files import printable

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

    def name_in_code(self, folder: Path) -> str:
        """Write the name of the folder as it stands between double quotes in Python."""
        return printable((self.name or folder.name).replace("\\", r"\\").replace('"', r"\""))


DEFAULTS = ReleaseOptions()
