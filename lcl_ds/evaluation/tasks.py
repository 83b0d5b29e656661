"""The tasks of ``lcl_ds.evaluate``: one function each, from an encoder and pictures to figures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lcl_ds.config import Config
from lcl_ds.errors import UserError
from lcl_ds.evaluation.caption import (
    Captioner,
    CaptionSettings,
    captions_of,
    new_captioner,
    require_scorer,
    score,
    train_captioner,
)
from lcl_ds.evaluation.documents import TEST_EVERY, HeldOutReader
from lcl_ds.evaluation.encoder import KINDS, FrozenEncoder, Kind
from lcl_ds.evaluation.features import Features, PatchTokens, features_of, patches_of_pictures
from lcl_ds.evaluation.finetune import FinetuneSettings, finetune
from lcl_ds.evaluation.pictures import LABEL_COLUMNS, PictureSet
from lcl_ds.evaluation.probes import ProbeOptions, Split, accuracy, attentive, few, linear, nearest, split_of
from lcl_ds.evaluation.results import Figure
from lcl_ds.evaluation.retrieval import (
    LEAST_PAIRS,
    best_ranks,
    pair_features,
    recalls,
    retrieval_figures,
    too_few_pairs,
)
from lcl_ds.evaluation.text import IMAGE_KIND, TextReader
from lcl_ds.models.network import LCLModel
from lcl_ds.settings import suggest
from lcl_ds.tokens import TextTokenizer

PROMPTS = ("a photo of a {}.", "{}")
"""Texts for a class in zero-shot classification; its feature is their mean."""


@dataclass(frozen=True)
class Trained:
    """A network with its decoder, and the settings of its run: what tasks with text need."""

    model: LCLModel
    config: Config


@dataclass(frozen=True)
class Options:
    """What the command line decides."""

    kinds: tuple[Kind, ...] = tuple(KINDS)
    labels: tuple[str, ...] = ()
    """None named: all that the pictures have."""
    probe: ProbeOptions = field(default_factory=ProbeOptions)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    caption: CaptionSettings = field(default_factory=CaptionSettings)
    prompts: tuple[str, ...] = PROMPTS
    class_names: dict[str, str] = field(default_factory=dict)
    """What to call a class in a prompt, where its label is no word."""
    memory: int = 4 << 30
    """Bytes of patch tokens that are kept in memory."""
    decoder: str | None = None
    """Folder of the decoder that captions; None: a small one from scratch."""
    tokenizer: str | None = None


@dataclass
class Measured:
    """An encoder and pictures, with what several tasks need of both."""

    encoder: FrozenEncoder
    test: PictureSet
    train: PictureSet | None = None
    """None: two thirds of ``test`` train what has to be trained."""
    trained: Trained | None = None
    """None: there is no decoder."""
    options: Options = field(default_factory=Options)
    cache: Path | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        train = self.train.pictures if self.train else []
        self.all = PictureSet(self.test.name, [*train, *self.test.pictures], self.test.left_out)
        if self.train:
            self.all.left_out.update(self.train.left_out)
            self.is_test = [False] * len(train) + [True] * len(self.test.pictures)
        else:
            order = {group: n for n, group in enumerate(dict.fromkeys(p.group for p in self.test.pictures))}
            self.is_test = [order[picture.group] % TEST_EVERY == 0 for picture in self.test.pictures]

    @property
    def name(self) -> str:
        return self.test.name

    @property
    def probe_options(self) -> ProbeOptions:
        return self.options.probe

    @cached_property
    def features(self) -> Features:
        """The vectors of all pictures that can be read."""
        features = readable_features(self.encoder, self.all, self.cache)
        self.all.left_out.update(features.left_out)
        return features

    @cached_property
    def vectors(self) -> dict[Kind, Tensor]:
        """The kinds of vectors that were asked for.

        Raises:
            UserError: the encoder has none of them.
        """
        vectors = {kind: self.features.vectors[kind] for kind in self.options.kinds if kind in self.features.vectors}
        if not vectors:
            raise UserError(
                f"--features {' '.join(self.options.kinds)}: {self.encoder.name} has none of them; it has "
                f"{', '.join(self.features.vectors)}"
            )
        return vectors

    @cached_property
    def patches(self) -> PatchTokens:
        return patches_of_pictures(self.encoder, self.all, self.features.kept, self.options.memory)

    @cached_property
    def splits(self) -> list[Split]:
        """The split of each label.

        Raises:
            UserError: no picture has a label, one is misspelt, or sides do not have the same classes.
        """
        known = self.all.label_names()
        if not known:
            raise UserError(f"--data {self.name}: no picture has a label; name labelled pictures")
        for label in self.options.labels:
            if label not in known:
                names = ", ".join(known[:20])
                raise UserError(f"--label {label}: no picture has it{suggest(label, known)}; they have {names}")
        found = [self._split(label) for label in self.options.labels or self._usual_labels(known)]
        self.notes += [reason for reason in found if isinstance(reason, str)]
        splits = [split for split in found if isinstance(split, Split)]
        if not splits:
            raise UserError([f"--data {self.name}: {reason}" for reason in found])
        return splits

    def _usual_labels(self, known: list[str]) -> list[str]:
        """Choose labels where none was named. Raises: UserError for caption pairs, which carry columns of any kind."""
        if not any(picture.captions for picture in self.all.pictures):
            return known
        usual = [label for label in known if label in LABEL_COLUMNS]
        if not usual:
            raise UserError(f"--label: name what to predict; the captioned pictures have {', '.join(known[:20])}")
        return usual

    def _split(self, label: str) -> Split | str:
        rows = self.features.kept.tolist()
        values = [self.all.pictures[row].labels.get(label) for row in rows]
        tests = [self.is_test[row] for row in rows]
        pairs = list(zip(values, tests, strict=True))
        sides = [{value for value, tests_it in pairs if value and tests_it is side} for side in (False, True)]
        if self.train and (unknown := sorted(sides[1] - sides[0])):
            raise UserError(
                f"--data {self.name}: {len(unknown)} of its {len(sides[1])} classes of the label {label!r} are not "
                f"among the {len(sides[0])} of the training pictures {self.train.name}: {', '.join(unknown[:5])}"
            )
        return split_of(label, values, tests)

    def text_reader(self) -> TextReader:
        """Open the decoder. Raises: UserError when the model has none."""
        if self.trained is None:
            raise UserError(
                f"{self.encoder.name}: has no decoder, which reads texts; name a run or one of its checkpoints"
            )
        return TextReader(self.trained.model, self.trained.config)


def readable_features(encoder: FrozenEncoder, found: PictureSet, cache: Path | None) -> Features:
    """Make the features of pictures.

    Raises:
        UserError: no picture can be read, or the encoder's features are not finite.
    """
    features = features_of(encoder, found, cache)
    if not len(features.kept):
        reasons = ", ".join(f"{reason} ({count})" for reason, count in features.left_out.most_common(3))
        raise UserError(f"--data {found.name}: no picture can be read: {reasons}")
    if not all(vectors.isfinite().all() for vectors in features.vectors.values()):
        raise UserError(f"{encoder.name}: the encoder's features are not finite; name another checkpoint")
    return features


def zeroshot(of: Measured) -> Iterator[Figure]:
    """Classification by the texts of the classes, without training; every picture tests."""
    reader, options = of.text_reader(), of.options
    images = F.normalize(of.features.vectors[IMAGE_KIND], dim=1)
    for split in of.splits:
        rows = torch.cat([split.train, split.test]).sort().values if of.train is None else split.test
        words = [options.class_names.get(name, name) for name in split.names]
        if options.class_names and (lost := [name for name in split.names if name not in options.class_names]):
            raise UserError(
                f"--classes names {len(options.class_names)} classes, and the pictures have {len(split.names)} of the "
                f"label {split.label!r}; missing: {', '.join(lost[:5])}"
            )
        texts = torch.stack([class_feature(reader, word, options.prompts) for word in words])
        whole = Split(split.label, split.names, split.classes, split.train, rows)
        hits = (images[rows] @ texts.T).argmax(1) == split.classes[rows]
        yield accuracy(of, "zeroshot", whole, hits, IMAGE_KIND, prompts=list(options.prompts))


def class_feature(reader: TextReader, word: str, prompts: Sequence[str]) -> Tensor:
    """Average the features of a class's prompts."""
    return F.normalize(reader.features([prompt.replace("{}", word) for prompt in prompts]).mean(0), dim=0)


def retrieval(of: Measured) -> Iterator[Figure]:
    """Images and their captions, both ways; of documents images and what announces them."""
    reader = of.text_reader()
    if not any(picture.captions for picture in of.test.pictures):
        raise UserError(
            f"--data {of.test.name}: no picture has a caption; name captioned pictures, or shards of documents alone"
        )
    found = of.test.captioned()
    features = readable_features(of.encoder, found, of.cache)
    of.notes += [f"left out: {reason} ({count})" for reason, count in features.left_out.most_common()]
    captions = [(row, text) for row, number in enumerate(features.kept) for text in found.pictures[number].captions]
    images = F.normalize(features.vectors[IMAGE_KIND], dim=1)
    texts = reader.features([text for _, text in captions])
    owner, own = torch.tensor([row for row, _ in captions]), torch.arange(len(images))
    yield from recalls("image_to_text", best_ranks(images, texts, own, owner), found.name, len(texts))
    yield from recalls("text_to_image", best_ranks(texts, images, owner, own), found.name, len(images))


def finetuned(of: Measured) -> Iterator[Figure]:
    """The whole encoder trained with an attentive head (the paper's full transfer)."""
    settings = of.options.finetune
    pictures = [of.all.pictures[number] for number in of.features.kept.tolist()]
    bf16 = of.encoder.dtype == torch.bfloat16
    for split in of.splits:
        hits = finetune(of.encoder, pictures, split.classes, split.train, split.test, settings, bf16)
        yield accuracy(of, "finetune", split, hits, "patches", epochs=settings.epochs)


def captioning(of: Measured) -> Iterator[Figure]:
    """A small decoder that captions what a frozen encoder sees."""
    require_scorer()
    settings = of.options.caption
    rows = of.features.kept.tolist()
    captions = [of.all.pictures[row].captions for row in rows]
    has = torch.tensor([bool(of_picture) for of_picture in captions])
    test = torch.tensor([of.is_test[row] for row in rows])
    sides = (has & ~test).nonzero()[:, 0], (has & test).nonzero()[:, 0]
    if not all(map(len, sides)):
        raise UserError(
            f"--data {of.all.name}: {len(sides[0])} captioned pictures would train and {len(sides[1])} test; name "
            "more of them"
        )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        captioner = _captioner(of, settings)
        train_captioner(captioner, of.patches.of, captions, sides[0], settings)
    made = captions_of(captioner, of.patches.of, sides[1], settings.beams)
    scores = score(made, [captions[row] for row in sides[1].tolist()])
    facts = {"epochs": settings.epochs, "beams": settings.beams, "words": scores.tokenizer}
    same: dict[str, Any] = {
        "task": "caption",
        "dataset": of.all.name,
        "count": len(made),
        "features": "patches",
        "settings": facts,
    }
    yield Figure(metric="bleu_4", value=scores.bleu_4, interval=scores.bleu_interval, **same)
    yield Figure(metric="cider", value=scores.cider, interval=scores.cider_interval, **same)


def _captioner(of: Measured, settings: CaptionSettings) -> Captioner:
    """Make the captioner. Raises: UserError when nobody says which tokenizer to use."""
    folder = of.options.tokenizer or of.options.decoder
    if folder is None and of.trained:
        folder = of.trained.config.data.tokenizer
    if folder is None:
        raise UserError("--tokenizer: is missing; a released encoder has none, so name a folder with tokenizer.json")
    try:
        tokenizer = TextTokenizer(folder)
    except ValueError as error:
        raise UserError(f"--tokenizer: {error}") from None
    _, patches, width = of.patches.of(torch.tensor([0])).shape
    return new_captioner(width, patches, tokenizer, settings, of.options.decoder).to(of.encoder.device)


def document_retrieval(trained: Trained, shards: Sequence[str], limit: int | None) -> tuple[list[Figure], list[str]]:
    """Images of documents and the contexts that announce them, both ways.

    Returns:
        Figures, and sentences about what is missing.

    Raises:
        UserError: shards cannot be read.
    """
    config = trained.config
    changes = {"shards": list(shards), **({"max_documents": limit} if limit else {})}
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=changes)})
    tokenizer = TextTokenizer(config.data.tokenizer)
    reader = HeldOutReader(config, tokenizer)
    held_out = reader.read_all()
    count = reader.pair_count(sequence.tokens for sequence in held_out.sequences)
    if reader.rows is None or count < LEAST_PAIRS:
        raise UserError(f"--data {', '.join(shards)}: {too_few_pairs(count)}")
    rows = reader.rows
    pairs = pair_features(trained.model, held_out.sequences, tokenizer.vocabulary, rows.row_tokens, rows.row_images)
    figures = retrieval_figures(pairs.image, pairs.context, ", ".join(shards))
    notes = [f"left out: {reason} ({count})" for reason, count in held_out.left_out.most_common()]
    if len(reader.numbers) < len(reader.source):
        notes.append(f"{len(reader.numbers):,} of {len(reader.source):,} documents were used; --limit asks for more")
    return figures, notes


TASKS: dict[str, Callable[[Measured], Iterator[Figure]]] = {
    "linear": linear,
    "attentive": attentive,
    "knn": nearest,
    "fewshot": few,
    "zeroshot": zeroshot,
    "retrieval": retrieval,
    "finetune": finetuned,
    "caption": captioning,
}
"""By the names of the command line; each is called with the same encoder and pictures."""
