"""Evaluate while training goes on: losses on held-out documents, probes and retrieval, by all ranks together.

Nothing that trains is touched: the step after an evaluation is bit for bit what it would have been without. The rows
are packed once, the same on any number of ranks, and their images stay in memory.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_ds.batch import Batch
from lcl_ds.config import Config
from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.stream.packing import PackedSequence, Row, collate, pack
from lcl_ds.data.stream.skips import reason_of
from lcl_ds.errors import UserError
from lcl_ds.evaluation.documents import HeldOut, HeldOutReader, Labels
from lcl_ds.evaluation.features import PatchTokens
from lcl_ds.evaluation.held_out import PROBES, Labelled, splits_of
from lcl_ds.evaluation.results import Figure
from lcl_ds.evaluation.retrieval import LEAST_PAIRS, best_ranks
from lcl_ds.models.build import image_size
from lcl_ds.models.network import LCLModel
from lcl_ds.phases import config_of_step
from lcl_ds.tokens import TextTokenizer, TokenSequence
from lcl_ds.training.distributed import RankInfo, all_reduce_sum, gather_objects, on_all_ranks
from lcl_ds.training.drawing import exchanged_normalizers
from lcl_ds.training.pulse import PULSE

logger = logging.getLogger(__name__)

Place = tuple[int, int]
"""Of an image among all of the evaluation: sample, and number in its document."""


@dataclass(frozen=True)
class HeldOutBatch:
    """One rank's part of one micro-step."""

    batch: Batch
    places: list[Place]
    """Of every image of the batch."""
    labels: list[Labels]
    """Of every image of the batch."""
    is_test: list[bool]
    """Of every image of the batch."""


@dataclass
class Recorded:
    """What one forward pass computes on its way to the losses; of images that are real, on the CPU."""

    patches: list[Tensor] = field(default_factory=list)
    pooled: list[Tensor] = field(default_factory=list)
    contexts: list[Tensor] = field(default_factory=list)
    """Features of contexts, one for each contrastive pair."""


@dataclass
class HeldOutEvaluation:
    """The evaluations of one run while it trains; every rank has one and calls it at the same steps.

    Args:
        engine: of DeepSpeed, around the objective.
        stopped: says whether the ranks agreed to stop; collective.
    """

    engine: Any
    config: Config
    rank_info: RankInfo
    stopped: Callable[[], bool]
    _batches: list[HeldOutBatch] | None = None
    _size: int = 0

    def is_due(self, step: int) -> bool:
        """Say whether a step ends with an evaluation: the same ones, wherever a run was stopped and continued."""
        every = self.config.evaluation.every
        return every is not None and self.config.evaluation.shards is not None and step % every == 0

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float | None] | None:
        """Evaluate the weights of this moment; collective.

        Returns:
            Figures by name; None where the ranks agreed to stop, or the time was up.

        Raises:
            UserError: on all ranks: held-out shards that cannot be read any more.
        """
        started = time.monotonic()
        batches = self._held_out(step)
        objective = self.engine.module
        terms = [objective.count_terms(held_out.batch) for held_out in batches]
        normalizers_of = exchanged_normalizers(terms, self.rank_info, self.config.objective)
        sums = {name: torch.zeros((), dtype=torch.float64) for name in objective.losses}
        recorded, finished = Recorded(), True
        was_training = objective.training
        self.engine.eval()
        try:
            with recording(objective.model, recorded, self._wants_patches):
                for number, (held_out, normalizers) in enumerate(zip(batches, normalizers_of, strict=True), 1):
                    PULSE.begin("evaluating", step, number)
                    if self.stopped() or self._time_is_up(started):
                        finished = False
                        break
                    outputs = self.engine(held_out.batch.to(self.rank_info.device), normalizers)
                    for name in sums:
                        sums[name] += outputs[name].double().reshape(()).cpu()
        finally:
            self.engine.train(was_training)
        if not finished or self.stopped():  # probes can take a while, and hear of nothing
            return None
        return self._figures(sums, batches, recorded)

    @property
    def _wants_patches(self) -> bool:
        return "attentive" in self.config.evaluation.tasks and bool(self.config.evaluation.probe_labels)

    def _time_is_up(self, started: float) -> bool:
        seconds, limit = time.monotonic() - started, self.config.evaluation.max_seconds
        late = all_reduce_sum(torch.tensor([int(seconds > limit)], device=self.rank_info.device)).item() > 0
        if late and self.rank_info.is_first:
            logger.warning(
                "the evaluation took longer than evaluation.max_seconds=%g and was given up; lower "
                "evaluation.documents_in_training or raise the limit",
                limit,
            )
        return late

    def _held_out(self, step: int) -> list[HeldOutBatch]:
        """Read this rank's part of the documents, once for each size of images; collective."""
        config = config_of_step(self.config, step)
        settings = config.evaluation.model_copy(update={"max_documents": config.evaluation.documents_in_training})
        config = config.model_copy(update={"evaluation": settings})
        PULSE.begin("evaluating", step)
        if self._batches is None or self._size != image_size(config.model):
            with on_all_ranks(self.rank_info):
                reader = HeldOutReader(config, TextTokenizer(config.data.tokenizer), with_sequences=True)
                by_sample = _pieces_of(reader)
            readable = set.intersection(*map(set, gather_objects([*by_sample])))
            pieces = [(number, piece) for number in by_sample if number in readable for piece in by_sample[number]]
            with on_all_ranks(self.rank_info):
                self._batches, self._size = self._packed(reader, config, pieces), reader.image_size
        return self._batches

    def _packed(
        self, reader: HeldOutReader, config: Config, pieces: list[tuple[int, TokenSequence]]
    ) -> list[HeldOutBatch]:
        """Pack what all ranks can read into the same rows, and decode the images of this rank's."""
        samples = dict(reader.samples())
        assert reader.rows is not None  # sequences were asked for
        lengths, images = [len(piece.input_ids) for _, piece in pieces], [len(piece.images) for _, piece in pieces]
        rows = pack(lengths, images, reader.rows.row_tokens, reader.rows.row_images)
        together = config.train.global_batch_rows // config.train.accumulation_steps
        rank, world_size = self.rank_info.rank, self.rank_info.world_size
        batches = []
        for chunk in np.array_split(np.arange(len(rows)), max(1, math.ceil(len(rows) / together))):
            per_rank = math.ceil(len(chunk) / world_size)
            own = [[pieces[i] for i in rows[row]] for row in chunk[rank::world_size]]
            batches.append(self._collated(reader, own, per_rank, samples))
        return batches

    def _collated(
        self, reader: HeldOutReader, rows: list[list[Any]], row_count: int, samples: dict[int, bool]
    ) -> HeldOutBatch:
        """Decode the images of some rows and lay these side by side; empty rows fill up."""
        assert reader.rows is not None
        packed: list[Row] = []
        places: list[Place] = []
        labels: list[Labels] = []
        for row in rows:
            sequences: list[PackedSequence] = []
            for number, piece in row:
                try:
                    document, of_images = reader.document(number)
                except (BadSampleError, OSError) as problem:
                    where = reader.source.where(number)
                    sentence = f"evaluation.shards: {where}: {reason_of(problem)}, and before it could be read"
                    raise UserError(sentence) from problem
                held_out = HeldOut()
                pixels = reader.pixels(number, document, held_out.left_out, piece.images)
                for sequence in reader.with_pixels(document.key, piece, pixels):
                    sequences.append(sequence)
                    places += [(number, image) for image in sequence.tokens.images]
                    labels += [of_images[image] if of_images else {} for image in sequence.tokens.images]
            packed.append(Row(tuple(sequences)))
        packed += [Row(())] * (row_count - len(packed))
        batch = collate(
            packed, reader.rows.row_tokens, reader.image_size, reader.vocabulary, reader.rows.view.readout_names
        )
        return HeldOutBatch(batch, places, labels, [samples[number] for number, _ in places])

    def _figures(
        self, sums: dict[str, Tensor], batches: list[HeldOutBatch], recorded: Recorded
    ) -> dict[str, float | None]:
        """Let all ranks have all features, and each work out the figures of some labels."""
        pairs = [
            (held_out.places[image], feature.clone())  # or the whole tensor would be sent with each of its rows
            for held_out, contexts in zip(batches, recorded.contexts, strict=False)
            for image, feature in zip(held_out.batch.readouts["context"].images.tolist(), contexts, strict=True)
        ]
        own = _Share(
            sums={name: float(value) for name, value in sums.items()},
            images=[place for held_out in batches for place in held_out.places],
            labels=[of_image for held_out in batches for of_image in held_out.labels],
            is_test=[test for held_out in batches for test in held_out.is_test],
            pooled=_joined(recorded.pooled, batches),
            means=_joined([patches.float().mean(1) for patches in recorded.patches], batches),
            patches=_joined([patches.half() for patches in recorded.patches], batches) if self._wants_patches else None,
            pairs=pairs,
        )
        shares: list[_Share] = gather_objects(own)
        figures: dict[str, float] = {name: sum(share.sums[name] for share in shares) for name in sums}
        whole = _whole(shares)
        splits, _ = splits_of(self.config.evaluation.probe_labels, whole.labels, whole.is_test)
        told = gather_objects(self._probes(whole, splits[self.rank_info.rank :: self.rank_info.world_size]))
        figures |= {name: value for of_rank in told for name, value in of_rank.items()}
        if "retrieval" in self.config.evaluation.tasks and len(whole.pairs) >= LEAST_PAIRS:
            numbers = {place: number for number, place in enumerate(whole.images)}
            image = F.normalize(whole.pooled[[numbers[place] for place, _ in whole.pairs]], dim=-1)
            context = F.normalize(torch.stack([feature for _, feature in whole.pairs]).float(), dim=-1)
            ranks = best_ranks(image, context, torch.arange(len(image)), torch.arange(len(image)))
            figures["retrieval/recall_at_1"] = float((ranks <= 1).float().mean())
            figures["retrieval/recall_at_10"] = float((ranks <= 10).float().mean())
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}

    def _probes(self, whole: "_Share", splits: list[Any]) -> dict[str, float]:
        if not splits or not whole.means.isfinite().all() or not whole.pooled.isfinite().all():
            return {}

        def make_patches() -> PatchTokens:
            assert whole.patches is not None
            patches = whole.patches
            return PatchTokens(lambda rows: iter([patches[list(rows)].float()]), len(patches), 0)

        labelled = Labelled(splits, {"mean": whole.means, "head": whole.pooled}, make_patches)
        with torch.enable_grad():
            found = [
                figure
                for task, probe in PROBES.items()
                if task in self.config.evaluation.tasks
                for figure in probe(labelled)
            ]
        return {name_of(figure): figure.value for figure in found}


def _pieces_of(reader: HeldOutReader) -> dict[int, list[TokenSequence]]:
    """Make the sequences of all samples that this rank can read; the final evaluation counts the others."""
    pieces = {}
    for number, _ in reader.samples():
        with suppress(BadSampleError, OSError):
            document, _ = reader.document(number)
            pieces[number] = reader.pieces(number, document)
    return pieces


def name_of(figure: Figure) -> str:
    """Name the figure of a probe: ``linear/colour`` of the pooling head, ``linear/colour/mean`` of the mean token."""
    return f"{figure.task}/{figure.label}{'/mean' if figure.features == 'mean' else ''}"


@dataclass
class _Share:
    """What one rank found out, or all of them."""

    sums: dict[str, float]
    images: list[Place]
    labels: list[Labels]
    is_test: list[bool]
    pooled: Tensor
    means: Tensor
    patches: Tensor | None
    pairs: list[tuple[Place, Tensor]]


def _joined(tensors: list[Tensor], batches: list[HeldOutBatch]) -> Tensor:
    """Join what was recorded, without the constant image of batches that have none."""
    return torch.cat([values[: len(b.places)] for values, b in zip(tensors, batches, strict=True)])


def _whole(shares: list[_Share]) -> _Share:
    """Join the shares of all ranks in the order of the documents, whichever rank had them."""
    images = [place for share in shares for place in share.images]
    order = sorted(range(len(images)), key=images.__getitem__)
    labels = [of_image for share in shares for of_image in share.labels]
    is_test = [test for share in shares for test in share.is_test]
    patches = [share.patches for share in shares if share.patches is not None]
    return _Share(
        sums={},
        images=[images[i] for i in order],
        labels=[labels[i] for i in order],
        is_test=[is_test[i] for i in order],
        pooled=torch.cat([share.pooled for share in shares])[order],
        means=torch.cat([share.means for share in shares])[order],
        patches=torch.cat(patches)[order] if patches else None,
        pairs=sorted((pair for share in shares for pair in share.pairs), key=lambda pair: pair[0]),
    )


@contextmanager
def recording(model: LCLModel, recorded: Recorded, keep_patches: bool) -> Iterator[None]:
    """Keep what the forward passes of the block compute.

    Only the whole objective may be called under ZeRO-3, which gathers weights module by module, so features are taken
    where they pass by.
    """

    def after_vision(module: nn.Module, inputs: Any, output: Tensor) -> None:
        patches = output.float().cpu()
        recorded.patches.append(patches if keep_patches else patches.mean(1, keepdim=True))

    def after_pooling(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        recorded.pooled.append(output[0].float().cpu())

    def after_context(module: nn.Module, inputs: Any, output: Tensor) -> None:
        recorded.contexts.append(output.float().cpu())

    hooks = [
        model.vision.register_forward_hook(after_vision),
        model.pooling.register_forward_hook(after_pooling),
        model.context_head.register_forward_hook(after_context),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
