"""Recorded weights, batches and results of the published code (tests/data/golden/README.md).

More of them may stand in the folder that the environment variable LCL_GOLDEN_DIR names.
"""

import json
import os
from pathlib import Path

import numpy as np
from safetensors import safe_open

from lcl_ds.data.sequences import DocumentView
from lcl_ds.data.stream.packing import PackedSequence
from lcl_ds.models.weights.published import PAD, PublishedConfig
from lcl_ds.tokens import ImageSlot, TokenSequence

FOLDERS = [Path(__file__).resolve().parents[1] / "data" / "golden"]
if extra := os.environ.get("LCL_GOLDEN_DIR"):
    FOLDERS.append(Path(extra))
GOLDEN = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.safetensors"))}


class Golden:
    """One golden file."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.config = json.loads(metadata["config"])
        self.weighting = float(metadata["contrastive_weight"]), float(metadata["generation_weight"])
        self.weights, self.batch, self.expected, self.grads = (
            {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
            for part in ("weights", "batch", "expected", "grads")
        )


def sequences_of(golden: Golden, published_config: PublishedConfig) -> list[PackedSequence]:
    """The rows of the batch as our sequences, without their padding."""
    images, sequences = golden.batch["images"].numpy(), []
    used = 0
    for number, padded in enumerate(golden.batch["input_ids"].numpy()):
        ids = padded[: len(np.trim_zeros(padded, "b"))] if PAD == 0 else padded
        starts = np.nonzero(ids == published_config.vocabulary.soi)[0] + 1
        slots = tuple(ImageSlot(i, int(start), has_context=True) for i, start in enumerate(starts))
        numbers, pixels = tuple(range(len(slots))), images[used : used + len(slots)]
        used += len(slots)
        tokens = DocumentView("reference").annotate(TokenSequence(ids, slots, numbers), published_config.vocabulary)
        sequences.append(PackedSequence(f"golden/{number}", tokens, pixels))
    assert used == len(images)
    return sequences
