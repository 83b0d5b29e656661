"""``python -m lcl_ds.bench train``: forward and backward of a whole training step against the published layout.

Both sides get the same documents, weights and modules, and compute the same loss (``lcl`` objective, fp32 on a CPU).

- Ours: documents packed into rows, attention within documents, losses of lcl_kernels.
- Published (OpenGVLab/LCL): a row for each document, padded to the context length; a dense [L, L] additive causal mask;
  logits of all text positions at once in fp32 and ``F.cross_entropy``. Its boolean gathers are index tensors here, and
  its pooling is fused as ours is, which both are in its favour.
- Published, is_causal: the same without the mask, so that attention skips what is masked.

Data: full packed rows, as training draws them, and the documents in them; token ids and pixels are random. MMC4-like
documents have text of log-normal length, 425 tokens on average (43 B tokens in 101.2 M documents), one to six images,
three on average, and at most a context of tokens. LAION-like pairs have captions of 14 tokens on average; half have the
image first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_ds.batch import Batch
from lcl_ds.bench.peers import DTYPES
from lcl_ds.data.sequences import DocumentView
from lcl_ds.data.stream.packing import PackedSequence, Row, collate, pack
from lcl_ds.errors import UserError
from lcl_ds.models.build import build_model
from lcl_ds.models.network import LCLModel
from lcl_ds.models.settings import ModelSettings
from lcl_ds.objectives import lcl
from lcl_ds.objectives.base import local_normalizers
from lcl_ds.tokens import CONTROL_TOKENS, IMAGE_OVERHEAD, TokenSequence, Vocabulary, encode_sequence

OURS, PADDED, PUBLISHED, IS_CAUSAL = "lcl_ds", "lcl_ds, padded", "published", "published, is_causal"
METHODS = (OURS, PADDED, PUBLISHED, IS_CAUSAL)
TEXT_MEAN = {"documents": 425, "pairs": 14}
TEXT_SPREAD = {"documents": 0.8, "pairs": 0.5}
"""Standard deviation of the logarithm of text lengths."""
CONTEXT = {"documents": 2048, "pairs": 128}
ROW_TOKENS = {"cpu": {"documents": 2048, "pairs": 512}, "cuda": {"documents": 2048, "pairs": 2048}}
ROWS = {"cpu": {"documents": 2, "pairs": 8}, "cuda": {"documents": 16, "pairs": 32}}
WINDOW = {"documents": 32, "pairs": 128}
"""Samples drawn for each row, so that there are enough full ones."""
FULL = 0.95
"""From this share on a row is full; in training 98 to 99 % are."""
PATCH = 32


@dataclass(frozen=True)
class TrainCase:
    """One kind of samples and the sizes of the network; small, so that it can be sent to another process."""

    kind: str
    """``documents`` or ``pairs``."""
    rows: int
    """Packed rows; the documents in them are the work of all methods."""
    dtype_name: str
    device_name: str
    seed: int = 0
    width: int = 512
    layers: int = 6
    vision_width: int = 384
    vision_layers: int = 6
    image_size: int = 224
    vocab_size: int = 49411
    context: int = 2048
    """Tokens of a padded row."""
    row_tokens: int = 2048
    """Tokens of a packed row, and positions of the decoder."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def image_tokens(self) -> int:
        return (self.image_size // PATCH) ** 2

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocab_size - len(CONTROL_TOKENS))

    @property
    def title(self) -> str:
        return (
            f"training step, {self.rows} packed rows of {self.kind}, decoder {self.width} x {self.layers}, "
            f"vision tower {self.vision_width} x {self.vision_layers}, {self.image_tokens} tokens per image, "
            f"V {self.vocab_size}, {self.dtype_name}"
        )

    def describe(self) -> dict[str, Any]:
        names = ("rows", "width", "layers", "vision_width", "vision_layers", "image_size", "vocab_size")
        shape = {name: getattr(self, name) for name in names}
        rows = {"row_tokens": self.row_tokens, "context": self.context}
        return {"kind": self.kind, "dtype": self.dtype_name, "device": self.device_name, "shape": {**shape, **rows}}

    def model(self) -> LCLModel:
        """The network in training mode; the same weights at every call."""
        settings = ModelSettings.model_validate(
            {
                "vision": {
                    "model_type": "clip_vision_model",
                    "hidden_size": self.vision_width,
                    "intermediate_size": 4 * self.vision_width,
                    "num_hidden_layers": self.vision_layers,
                    "num_attention_heads": heads(self.vision_width),
                    "image_size": self.image_size,
                    "patch_size": PATCH,
                    "hidden_act": "gelu",
                },
                "pooling": {"num_attention_heads": heads(self.width)},
                "decoder": {
                    "model_type": "gpt2",
                    "n_embd": self.width,
                    "n_layer": self.layers,
                    "n_head": heads(self.width),
                    "activation_function": "gelu",
                },
            }
        )
        model = build_model(settings, self.vocab_size, self.row_tokens, self.seed)
        return model.to(self.device, self.dtype).train()

    def packed_rows(self) -> list[Row]:
        """Some of the full rows that a window of documents makes; the same at every call.

        Raises:
            UserError: there are not so many full rows.
        """
        rng = np.random.default_rng(self.seed)
        window = [self._tokens(rng) for _ in range(WINDOW[self.kind] * self.rows)]
        lengths = [len(tokens.input_ids) for tokens in window]
        packed = pack(lengths, [len(tokens.slots) for tokens in window], self.row_tokens, 10**6)
        full = [row for row in packed if sum(lengths[number] for number in row) >= FULL * self.row_tokens]
        if len(full) < self.rows:
            raise UserError(
                f"--rows {self.rows}: {len(full)} rows of {self.row_tokens} tokens became full; ask for fewer"
            )
        chosen = [full[number] for number in rng.permutation(len(full))[: self.rows]]
        return [Row(tuple(self._with_pixels(number, window[number], rng) for number in row)) for row in chosen]

    def _tokens(self, rng: np.random.Generator) -> TokenSequence:
        """One document: its images stand at random places of its text, that of a pair before or after it."""
        block = self.image_tokens + IMAGE_OVERHEAD
        images = 1 if self.kind == "pairs" else int(np.clip(rng.poisson(2) + 1, 1, 6))
        images = max(1, min(images, (self.context - 8) // block))
        spread = TEXT_SPREAD[self.kind]
        length = rng.lognormal(np.log(TEXT_MEAN[self.kind]) - spread**2 / 2, spread)
        length = int(np.clip(length, images + 1, self.context - images * block - 2))
        cuts = rng.integers(0, 2, 1) * length if self.kind == "pairs" else np.sort(rng.integers(0, length + 1, images))
        first, *others = (" ".join(map(str, part)) for part in np.split(np.arange(length), cuts))
        segments: list[str | int] = [first]
        for image, text in enumerate(others):
            segments += [image, text]
        ids = rng.integers(0, self.vocabulary.text_size, length)
        encode = lambda text: ids[[int(word) for word in text.split()]].tolist()  # noqa: E731
        (tokens,) = encode_sequence(segments, encode, self.vocabulary, self.image_tokens, self.context, images)
        return DocumentView().annotate(tokens, self.vocabulary)

    def _with_pixels(self, number: int, tokens: TokenSequence, rng: np.random.Generator) -> PackedSequence:
        shape = (len(tokens.slots), 3, self.image_size, self.image_size)
        return PackedSequence(str(number), tokens, rng.integers(0, 256, shape, dtype=np.uint8))

    def batch(self, packed: bool) -> Batch:
        """The rows as they are, or their documents, one in each row of ``context`` tokens."""
        rows, length = self.packed_rows(), self.row_tokens
        if not packed:
            rows, length = [Row((sequence,)) for row in rows for sequence in row.sequences], self.context
        return collate(rows, length, self.image_size, self.vocabulary, DocumentView.readout_names).to(self.device)


def heads(width: int) -> int:
    """Of 64 channels, as in ViT-B/32 and the published decoders."""
    return max(1, width // 64)


def loss_of(method: str, model: LCLModel, batch: Batch) -> Callable[[], Tensor]:
    """What a method computes on its batch (see :func:`is_packed`)."""
    if method in (OURS, PADDED):
        objective = lcl.Objective(model, lcl.Settings())
        (normalizers,) = local_normalizers(objective, batch)
        return lambda: objective(batch, normalizers)["loss"]
    mask = None
    if method == PUBLISHED:
        length, device = batch.input_ids.shape[1], batch.input_ids.device
        mask = torch.full((1, 1, length, length), -torch.inf, device=device, dtype=model.decoder.dtype).triu_(1)
    return partial(published_loss, model, batch, mask)


def is_packed(method: str) -> bool:
    return method == OURS


def published_loss(model: LCLModel, batch: Batch, mask: Tensor | None) -> Tensor:
    """Generation plus 0.1 contrastive loss in plain torch, on a batch with one document in each row.

    Args:
        mask: additive [1, 1, L, L]; None: attention is told that it is causal.
    """
    pooled, tokens = model.encode_images(batch.images, batch.image_seeds)
    embeddings = model.decoder.get_input_embeddings()(batch.input_ids)
    places = batch.slot_positions[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    flat = embeddings.flatten(0, 1).index_copy(0, places.flatten(), tokens.flatten(0, 1))
    model.decoder.set_attn_implementation("sdpa")
    states = model.decoder(inputs_embeds=flat.view_as(embeddings), attention_mask=mask, use_cache=False)
    model.choose_attention()  # other methods run the same model
    hidden = states.last_hidden_state.flatten(0, 1)
    text = model.lm_head.norm(hidden.index_select(0, batch.label_positions))
    generation = F.cross_entropy(F.linear(text, model.lm_head.weight).float(), batch.labels)
    pairs = batch.readouts["context"]
    image = F.normalize(pooled.index_select(0, pairs.images).float(), dim=-1)
    context = F.normalize(model.context_head(hidden.index_select(0, pairs.positions)).float(), dim=-1)
    logits = model.logit_scale() * image @ context.T
    target = torch.arange(len(logits), device=logits.device)
    return generation + 0.1 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_cases(
    device: str, dtype: str, *, kinds: Sequence[str] = (), rows: int | None = None, **sizes: Any
) -> list[TrainCase]:
    """A case for each kind of samples; on a GPU the towers of ViT-B/32, on a CPU narrower ones.

    Args:
        rows: packed rows; None: as many as suit the device.
        sizes: fields of :class:`TrainCase`; None: those that suit the device.
    """
    full = {"width": 512, "layers": 12, "vision_width": 768, "vision_layers": 12} if device == "cuda" else {}
    chosen = {**full, **{name: size for name, size in sizes.items() if size is not None}}
    return [
        TrainCase(
            kind,
            rows or ROWS[device][kind],
            dtype,
            device,
            **{"context": CONTEXT[kind], "row_tokens": ROW_TOKENS[device][kind], **chosen},
        )
        for kind in kinds or tuple(TEXT_MEAN)
    ]
