"""Attentive probe, the paper's protocol for frozen encoders: a learned query pools the patch tokens, a linear layer
reads what it gathered."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class AttentiveSettings:
    """How the probe is trained."""

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    heads: int = 4
    seed: int = 0


class AttentiveHead(nn.Module):
    """One learned query attends to the normalised patch tokens; what it gathers goes through a linear layer.

    Args:
        width: of the patch tokens.
        classes: outputs.
        heads: of the attention; where they do not divide the width, the next smaller number that does.
    """

    def __init__(self, width: int, classes: int, heads: int):
        super().__init__()
        heads = next(number for number in range(min(heads, width), 0, -1) if width % number == 0)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.output = nn.Linear(width, classes)

    def forward(self, patches: Tensor) -> Tensor:
        """Read patches [B, N, width]; returns logits [B, classes]."""
        tokens = self.norm(patches)
        pooled, _ = self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        return self.output(pooled[:, 0])


def attentive_probe(
    patches_of: Callable[[Tensor], Tensor],
    classes: Tensor,
    train: Tensor,
    test: Tensor,
    settings: AttentiveSettings = AttentiveSettings(),
) -> Tensor:
    """Train the probe on frozen patch tokens and say which test images it gets right.

    Args:
        patches_of: gives patch tokens [B, N, width] of images, by their numbers.
        classes: int64 [M].
        train, test: disjoint int64 numbers of images.

    Returns:
        bool [len(test)].
    """
    count = int(classes.max()) + 1
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        first = patches_of(train[:1])
        head = AttentiveHead(first.shape[-1], count, settings.heads).to(first.device)
        optimizer = torch.optim.AdamW(
            head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=True
        )
        batches_per_epoch = math.ceil(len(train) / settings.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.epochs * batches_per_epoch
        )
        for _ in range(settings.epochs):
            for rows in train[torch.randperm(len(train))].split(settings.batch_size):
                logits = head(patches_of(rows).float())
                loss = F.cross_entropy(logits, classes[rows].to(logits.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        answers = [head(patches_of(rows).float()).argmax(1).cpu() for rows in test.split(256)]
    return torch.cat(answers) == classes[test]
