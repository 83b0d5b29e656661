"""Compile the blocks of both towers with torch.compile, at any ZeRO stage."""

import os
import shutil

import torch
from torch import nn

from lcl_ds.errors import UserError
from lcl_ds.models.blocks import blocks_of

COMPILERS = ("g++", "clang++", "c++")
"""What torch looks for where CXX names none."""


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the forward and the backward pass of each block; to be called before DeepSpeed starts.

    All blocks of a tower share their graphs. How many images a micro-step has is a variable of them from the second
    number on, so they are compiled twice at most.

    Args:
        backend: of torch.compile.
    """
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward, backend=backend)


def check_compiler() -> None:
    """See that there is what torch.compile needs beside itself. Raises: UserError."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"train.compile: torch.compile needs a C++ compiler, and there is no {' or '.join(names)} on this host; "
            "install one, or set train.compile=false"
        )
