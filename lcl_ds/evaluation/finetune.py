"""Full fine-tuning: the encoder is trained together with an attentive head (the paper's full transfer)."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from lcl_ds.errors import UserError
from lcl_ds.evaluation.attentive import AttentiveHead
from lcl_ds.evaluation.encoder import FrozenEncoder
from lcl_ds.evaluation.pictures import Picture, decoded
from lcl_ds.evaluation.sharing import gather, own_part, sum_gradients
from lcl_ds.models.placement import visits


@dataclass(frozen=True)
class FinetuneSettings:
    """How encoder and head are trained."""

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-4
    """Of the encoder at its highest; the head's is ten times as high."""
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Fraction of the steps in which the learning rate rises; then it falls as a cosine."""
    crop_scale: tuple[float, float] = (0.6, 1.0)
    heads: int = 4
    seed: int = 0


def finetune(
    encoder: FrozenEncoder,
    pictures: Sequence[Picture],
    classes: Tensor,
    train: Tensor,
    test: Tensor,
    settings: FinetuneSettings,
    bf16: bool = False,
) -> Tensor:
    """Train a copy of the encoder's weights and say which test images it gets right; the encoder is left as it was.

    Args:
        pictures: all of them can be read.
        classes: int64 [M] of the pictures.
        train, test: disjoint int64 numbers of pictures.
        bf16: compute in bf16, with fp32 weights.

    Returns:
        bool [len(test)].

    Raises:
        UserError: the encoder is larger than its device.
    """
    if visits(encoder.module):
        raise UserError(f"finetune: the weights of {encoder.name} do not fit on {encoder.device}; leave the task out")
    before = {name: weight.detach().clone() for name, weight in encoder.module.state_dict().items()}
    dtype = encoder.dtype
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        try:
            head = _train(encoder, pictures, classes, train, settings, bf16)
            return _hits(encoder, head, pictures, classes, test, bf16)
        finally:
            encoder.module.eval().requires_grad_(False).to(dtype)
            encoder.module.load_state_dict(before)


def _train(
    encoder: FrozenEncoder,
    pictures: Sequence[Picture],
    classes: Tensor,
    train: Tensor,
    settings: FinetuneSettings,
    bf16: bool,
) -> AttentiveHead:
    module, device = encoder.module.float().requires_grad_(True), encoder.device
    head = AttentiveHead(_width(encoder), int(classes.max()) + 1, settings.heads).to(device)
    groups: list[dict[str, Any]] = [
        {"params": list(module.parameters()), "lr": settings.learning_rate},
        {"params": list(head.parameters()), "lr": 10 * settings.learning_rate},
    ]
    weights = [weight for group in groups for weight in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    per_epoch = math.ceil(len(train) / settings.batch_size)
    total = settings.epochs * per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, round(settings.warmup * total), total)
    for epoch in range(settings.epochs):
        order = train[torch.randperm(len(train))]
        for rows, images in _batches(pictures, order, encoder.image_size, settings, epoch):
            optimizer.zero_grad()
            if len(rows):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = head(encoder.encode(images.to(device)).patches)
                # Of all processes together: the last batch of an epoch may be a small one.
                loss = F.cross_entropy(logits.float(), classes[rows].to(device), reduction="sum") / settings.batch_size
                loss.backward()
            sum_gradients(weights)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    return head


def _batches(
    pictures: Sequence[Picture], order: Tensor, size: int, settings: FinetuneSettings, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give this process's part of every batch of an epoch, with crops that depend on picture and epoch alone."""
    for rows in order.split(settings.batch_size):
        own = own_part(rows)
        if not len(own):  # the others wait for this process's gradients all the same
            yield own, torch.empty(0)
            continue

        def crop(number: int, own: Tensor = own) -> np.random.Generator:
            return np.random.default_rng([settings.seed, epoch, int(own[number])])

        chosen = [pictures[row] for row in own.tolist()]
        for numbers, pixels in decoded(chosen, size, max(1, len(own)), Counter(), crop, settings.crop_scale):
            yield own[torch.from_numpy(numbers)], torch.from_numpy(pixels)


@torch.no_grad()
def _hits(
    encoder: FrozenEncoder, head: AttentiveHead, pictures: Sequence[Picture], classes: Tensor, test: Tensor, bf16: bool
) -> Tensor:
    own = own_part(torch.arange(len(test)))
    answers: list[tuple[int, bool]] = []
    for numbers, pixels in decoded([pictures[row] for row in test[own].tolist()], encoder.image_size, 256, Counter()):
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=bf16):
            logits = head(encoder.encode(torch.from_numpy(pixels).to(encoder.device)).patches)
        places = own[torch.from_numpy(numbers)]
        right = logits.float().argmax(1).cpu() == classes[test[places]]
        answers += zip(places.tolist(), right.tolist(), strict=True)
    return torch.tensor([right for _, right in sorted(gather(answers))])


@torch.no_grad()
def _width(encoder: FrozenEncoder) -> int:
    size = encoder.image_size
    return encoder.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=encoder.device)).patches.shape[-1]
