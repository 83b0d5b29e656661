"""Read the decoder's feature of a text, where it was trained to announce an image: at ``<soi>`` (or as the objective
reads it)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lcl_ds.assembly import lane_settings
from lcl_ds.config import Config
from lcl_ds.data.documents import Document
from lcl_ds.data.sequences import Sequencer, View
from lcl_ds.data.stream.lanes import sequencer_of
from lcl_ds.data.stream.packing import PackedSequence, Row, collate
from lcl_ds.errors import UserError
from lcl_ds.evaluation.encoder import Kind
from lcl_ds.models.network import LCLModel
from lcl_ds.models.placement import device_of
from lcl_ds.objectives import objective_module
from lcl_ds.tokens import TextTokenizer, TokenSequence

TEXTS_PER_BATCH = 64
IMAGE_KIND: Kind = "head"
"""The image's side of the contrastive loss."""


class TextReader:
    """Features of texts by the network of a run, as its objective pairs them with images.

    Args:
        config: of the run.

    Raises:
        UserError: the objective pairs no texts with images, or the tokenizer is not there.
    """

    def __init__(self, model: LCLModel, config: Config):
        if "contrastive_loss" not in objective_module(config.objective.name).Objective.losses:
            raise UserError(
                f"objective.name={config.objective.name} trains no similarity of images and texts: retrieval and "
                "zero-shot need another run"
            )
        try:
            tokenizer = TextTokenizer(config.data.tokenizer)
        except ValueError as error:
            raise UserError(f"data.tokenizer: {error}; start where the run was started, or correct the path") from None
        self.model = model
        settings = lane_settings(config, training=False)
        self._view: View = settings.view
        self._sequencer: Sequencer = sequencer_of(settings, tokenizer)
        self._image_size = settings.image_size

    def _sequence(self, text: str) -> TokenSequence:
        """Take what the objective makes of a caption pair up to the position where the text is read."""
        vocabulary = self._sequencer.vocabulary
        if not self._sequencer.encode(text):
            raise UserError(f"the text {text[:60]!r} has nothing that the tokenizer knows; leave it out")
        document = Document("text", (text, 0), ("jpg",), is_pair=True)
        tokens, *rest = self._view.encode(document, self._sequencer, np.random.default_rng(0))
        if rest:  # too long for a row that holds an image as well: its beginning announces it, as in the published code
            return TokenSequence(np.append(tokens.input_ids[:-1], vocabulary.soi), (), ())
        ((position, _),) = tokens.readouts["context"]
        start = max(begin for begin in tokens.starts if begin <= position)
        return TokenSequence(tokens.input_ids[start : position + 1], (), ())

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """Return fp32 [T, D], L2-normalised, on the CPU."""
        sequences = [self._sequence(text) for text in texts]
        features = torch.empty(len(texts), self.model.context_head.proj.out_features)
        order = sorted(range(len(texts)), key=lambda number: len(sequences[number].input_ids))
        for start in range(0, len(order), TEXTS_PER_BATCH):
            numbers = order[start : start + TEXTS_PER_BATCH]
            features[numbers] = self._read([sequences[number] for number in numbers])
        return features

    def _read(self, sequences: list[TokenSequence]) -> Tensor:
        device = device_of(self.model)
        pixels = np.zeros((0, 3, self._image_size, self._image_size), np.uint8)
        rows = [Row((PackedSequence("text", tokens, pixels),)) for tokens in sequences]
        longest = max(len(tokens.input_ids) for tokens in sequences)
        batch = collate(rows, longest, self._image_size, self._sequencer.vocabulary, ()).to(device)
        width = self.model.context_head.proj.in_features
        no_image = torch.zeros(1, self._sequencer.image_tokens, width, device=device)
        states = self.model.decode(batch, no_image)
        ends = [row * longest + len(tokens.input_ids) - 1 for row, tokens in enumerate(sequences)]
        context = self.model.context_head(states[torch.tensor(ends, device=device)])
        return F.normalize(context.float(), dim=-1).cpu()
