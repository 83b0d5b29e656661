"""Make vectors of pictures with a frozen encoder, once: they are kept on disk by what they depend on."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcl_ds.evaluation.encoder import KINDS, Encoded, FrozenEncoder, Kind
from lcl_ds.evaluation.pictures import PictureSet, decoded
from lcl_ds.evaluation.sharing import gather
from lcl_ds.files import writing

logger = logging.getLogger(__name__)

FORMAT = 1
"""Part of the key; grows when the same encoder and pictures give other features."""
KEPT = "kept"


@dataclass
class Features:
    """Vectors of the pictures that could be read."""

    vectors: dict[Kind, Tensor]
    """fp32 [M, D] each, on the CPU."""
    kept: Tensor
    """int64 [M], the number of each picture within its set, in order."""
    left_out: Counter[str] = field(default_factory=Counter)


@torch.no_grad()
def features_of(
    encoder: FrozenEncoder, found: PictureSet, cache: Path | None = None, batch_size: int = 256
) -> Features:
    """Make the vectors of all pictures, or read those that were kept; processes share the pictures.

    Args:
        cache: folder for features; None: they are not kept.
    """
    path = None
    if cache is not None:
        key = f"{FORMAT} {encoder.identity()} {encoder.dtype} {found.identity()}"
        path = cache / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        kept = _read(path)
        if all(gather([kept is not None])):  # hosts may have folders of their own, and all make them or none
            assert kept is not None
            logger.info("features of %s are read from %s", found.name, path)
            return kept
    features = _make(encoder, found, batch_size)
    if path is not None and PartialState().is_main_process:
        _write(path, features)
    return features


def _make(encoder: FrozenEncoder, found: PictureSet, batch_size: int) -> Features:
    state = PartialState()
    own = range(state.process_index, len(found.pictures), state.num_processes)
    left_out: Counter[str] = Counter()
    numbers: list[np.ndarray] = []
    vectors: dict[Kind, list[Tensor]] = {}
    batches = decoded([found.pictures[number] for number in own], encoder.image_size, batch_size, left_out)
    for positions, pixels in batches:
        if not len(positions):
            continue
        numbers.append(np.array(own)[positions])
        images = torch.from_numpy(pixels).to(encoder.device)
        for kind, vector in encoder.encode(images).vectors().items():
            vectors.setdefault(kind, []).append(vector.cpu())
    told = [(numbers, vectors, left_out)]
    if state.num_processes > 1:
        told = gather_object(told)
    kept = torch.from_numpy(np.concatenate([n for part, _, _ in told for n in part] or [np.zeros(0, np.int64)]))
    order = kept.argsort()
    kinds = dict.fromkeys(kind for _, of_rank, _ in told for kind in of_rank)
    joined: dict[Kind, Tensor] = {
        kind: torch.cat([v for _, of_rank, _ in told for v in of_rank.get(kind, [])])[order] for kind in kinds
    }
    return Features(joined, kept[order], sum((of_rank for _, _, of_rank in told), Counter()))


def _read(path: Path) -> Features | None:
    """Read features that were kept; None where there are none, or what is there is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            vectors: dict[Kind, Tensor] = {kind: file.get_tensor(kind) for kind in KINDS if kind in names}
            left_out = Counter(json.loads(file.metadata()["left_out"]))
            return Features(vectors, file.get_tensor(KEPT), left_out)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write(path: Path, features: Features) -> None:
    """Keep features; a disk that takes none costs a warning."""
    tensors = {str(kind): vectors for kind, vectors in features.vectors.items()} | {KEPT: features.kept}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as file:
            save_file(
                {n: t.contiguous() for n, t in tensors.items()}, file.name, {"left_out": json.dumps(features.left_out)}
            )
    except (OSError, SafetensorError) as error:
        logger.warning("%s: features cannot be kept: %s", path, error)


class PatchTokens:
    """Patch tokens of images: kept in memory where they fit, else made anew whenever they are asked for.

    Args:
        encoded: gives the patch tokens [B, N, width] of images by their numbers, in batches.
        count: images.
        budget: bytes that this process may keep.
    """

    def __init__(self, encoded: Callable[[Sequence[int]], Iterator[Tensor]], count: int, budget: int):
        self._encoded = encoded
        self._memory: Tensor | None = None
        first = next(iter(encoded(range(1))))
        if first.numel() * first.element_size() * count > budget:
            return
        # Filled piece by piece: joined in the end they would need twice the memory.
        self._memory = torch.empty((count, *first.shape[1:]), dtype=first.dtype, device=first.device)
        done = 0
        for patches in encoded(range(count)):
            self._memory[done : done + len(patches)] = patches
            done += len(patches)

    def of(self, rows: Tensor) -> Tensor:
        """Return the patch tokens [B, N, width] of images by their numbers."""
        if self._memory is not None:
            return self._memory[rows.to(self._memory.device)]
        return torch.cat(list(self._encoded(rows.tolist())))


def patches_of_pictures(
    encoder: FrozenEncoder, found: PictureSet, kept: Tensor, budget: int, batch_size: int = 256
) -> PatchTokens:
    """Make patch tokens of the pictures that can be read, numbered as in ``kept``."""

    @torch.no_grad()
    def encoded(rows: Sequence[int]) -> Iterator[Tensor]:
        pictures = [found.pictures[int(kept[row])] for row in rows]
        for _, pixels in decoded(pictures, encoder.image_size, batch_size, Counter()):
            yield encoder.encode(torch.from_numpy(pixels).to(encoder.device)).patches

    return PatchTokens(encoded, len(kept), budget)


@torch.no_grad()
def encode_pixels(encoder: FrozenEncoder, pixels: Sequence[np.ndarray], batch_size: int = 256) -> Iterator[Encoded]:
    """Encode images that are decoded already, uint8 [3, H, W] each."""
    for start in range(0, len(pixels), batch_size):
        yield encoder.encode(torch.from_numpy(np.stack(pixels[start : start + batch_size])).to(encoder.device))


def vectors_of_pixels(encoder: FrozenEncoder, pixels: Sequence[np.ndarray]) -> dict[Kind, Tensor]:
    """Make the vectors of images that are decoded already, fp32 [M, D] on the CPU."""
    batches = [encoded.vectors() for encoded in encode_pixels(encoder, pixels)]
    return {kind: torch.cat([batch[kind].cpu() for batch in batches]) for kind in batches[0]}


def patches_of_pixels(encoder: FrozenEncoder, pixels: Sequence[np.ndarray], budget: int) -> PatchTokens:
    """Make patch tokens of images that are decoded already."""

    def encoded(rows: Sequence[int]) -> Iterator[Tensor]:
        return (batch.patches for batch in encode_pixels(encoder, [pixels[row] for row in rows]))

    return PatchTokens(encoded, len(pixels), budget)
