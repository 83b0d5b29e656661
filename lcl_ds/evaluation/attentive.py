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

    It is multi-head attention in another order. With one query, keys and values need not be made of every token: the
    query is taken to where the tokens are, and values are made of what was gathered.

    Args:
        width: of the patch tokens.
        classes: outputs.
        heads: of the attention; where they do not divide the width, the next smaller number that does.
    """

    def __init__(self, width: int, classes: int, heads: int):
        super().__init__()
        self.heads = next(number for number in range(min(heads, width), 0, -1) if width % number == 0)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)  # a bias would add the same to every token's score
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.output = nn.Linear(width, classes)
        for layer in (self.q, self.k, self.v):
            nn.init.uniform_(layer.weight, -math.sqrt(1.5 / width), math.sqrt(1.5 / width))
        for bias in (self.q.bias, self.v.bias, self.proj.bias):
            nn.init.zeros_(bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Read patches [B, N, width]; returns logits [B, classes]."""
        tokens = self.norm(patches)
        keys, values = (layer.weight.unflatten(0, (self.heads, -1)) for layer in (self.k, self.v))  # [H, d, width]
        query = self.q(self.query).unflatten(0, (self.heads, -1))  # [H, d]
        asked = torch.einsum("hd,hdw->wh", query, keys) / math.sqrt(query.shape[1])
        gathered = (tokens @ asked).softmax(1).transpose(1, 2) @ tokens  # [B, H, width]
        pooled = torch.einsum("bhw,hdw->bhd", gathered, values).flatten(1) + self.v.bias
        return self.output(self.proj(pooled))


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
