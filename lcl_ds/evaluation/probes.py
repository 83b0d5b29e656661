"""Tasks that predict labels from frozen features: one function each, which makes figures.

They are the same for the command, for the end of a run and for evaluations while it trains.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lcl_ds.evaluation.attentive import AttentiveSettings, attentive_probe
from lcl_ds.evaluation.encoder import Kind
from lcl_ds.evaluation.features import PatchTokens
from lcl_ds.evaluation.fewshot import SHOTS, fewshot
from lcl_ds.evaluation.intervals import of_mean, wilson
from lcl_ds.evaluation.neighbours import NEIGHBOURS, knn
from lcl_ds.evaluation.probe import ProbeImages, linear_probe
from lcl_ds.evaluation.results import Figure


@dataclass(frozen=True)
class Split:
    """Which pictures train and test one label; numbers are rows of the features."""

    label: str
    names: list[str]
    classes: Tensor
    """int64 [M]; 0 where a picture lacks the label."""
    train: Tensor
    test: Tensor

    @property
    def chance(self) -> float:
        """Return what naming always the most frequent class gives."""
        return float(torch.bincount(self.classes[self.test]).max() / len(self.test))


def split_of(label: str, values: Sequence[str | None], is_test: Sequence[bool]) -> Split | str:
    """Split pictures by their values of a label; a sentence where that gives no probe.

    Args:
        values: the class of every picture, None where it has none.
        is_test: whether each picture tests.
    """
    images = ProbeImages()
    for value, tests in zip(values, is_test, strict=True):
        images.add(value, tests)
    if reason := images.shortage():
        return left_out(label, reason)
    names = sorted({value for value in values if value is not None})
    number = {name: n for n, name in enumerate(names)}
    classes = torch.tensor([number[value] if value is not None else 0 for value in values])
    has, test = torch.tensor([value is not None for value in values]), torch.tensor(is_test)
    return Split(label, names, classes, (has & ~test).nonzero()[:, 0], (has & test).nonzero()[:, 0])


def left_out(label: str, reason: str) -> str:
    """Say that a label has no probe."""
    return f"probes of {label!r} are left out: {reason}"


@dataclass(frozen=True)
class ProbeOptions:
    """How probes are made."""

    attentive: AttentiveSettings = field(default_factory=AttentiveSettings)
    shots: tuple[int, ...] = SHOTS
    neighbours: int = NEIGHBOURS


class Probed(Protocol):
    """What the tasks need: features, and the splits of their pictures."""

    @property
    def name(self) -> str: ...
    @property
    def splits(self) -> Sequence[Split]: ...
    @property
    def vectors(self) -> Mapping[Kind, Tensor]:
        """Give fp32 [M, D] on the CPU by kind."""
        ...

    @property
    def patches(self) -> PatchTokens: ...
    @property
    def probe_options(self) -> ProbeOptions: ...
    @property
    def notes(self) -> list[str]: ...


def accuracy(of: Probed, task: str, split: Split, hits: Tensor, features: str, **settings: Any) -> Figure:
    """Make the figure of a classification."""
    right, count = int(hits.sum()), len(hits)
    return Figure(
        task,
        of.name,
        "accuracy",
        right / count,
        wilson(right, count),
        count,
        features,
        split.label,
        len(split.names),
        split.chance,
        settings,
    )


def linear(of: Probed) -> Iterator[Figure]:
    """Logistic regression on each kind of vector."""
    for split in of.splits:
        for kind, vectors in of.vectors.items():
            result = linear_probe(vectors, split.classes, split.train, split.test)
            yield accuracy(of, "linear", split, result.hits, kind, penalty=result.penalty)


def attentive(of: Probed) -> Iterator[Figure]:
    """A learned query over frozen patch tokens (the paper's frozen protocol)."""
    settings = of.probe_options.attentive
    for split in of.splits:
        hits = attentive_probe(of.patches.of, split.classes, split.train, split.test, settings)
        yield accuracy(of, "attentive", split, hits, "patches", epochs=settings.epochs)


def nearest(of: Probed) -> Iterator[Figure]:
    """Nearest neighbours by cosine."""
    k = of.probe_options.neighbours
    for split in of.splits:
        for kind, vectors in of.vectors.items():
            hits = knn(vectors, split.classes, split.train, split.test, k)
            yield accuracy(of, "knn", split, hits, kind, neighbours=k)


def few(of: Probed) -> Iterator[Figure]:
    """Logistic regression on a few images of each class."""
    for split in of.splits:
        for shots in of.probe_options.shots:
            for kind, vectors in of.vectors.items():
                accuracies = fewshot(vectors, split.classes, split.train, split.test, shots)
                if accuracies is None:
                    of.notes.append(f"fewshot of {shots}: a class of {split.label!r} has fewer training pictures")
                    break
                yield Figure(
                    "fewshot",
                    of.name,
                    "accuracy",
                    float(accuracies.mean()),
                    of_mean(accuracies),
                    len(split.test),
                    kind,
                    split.label,
                    len(split.names),
                    split.chance,
                    {"shots": shots, "draws": len(accuracies)},
                )
