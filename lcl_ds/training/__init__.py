"""Training; the only package that imports DeepSpeed.

Without a GPU DeepSpeed is told so before it looks for one, which spares a warning at every start.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
