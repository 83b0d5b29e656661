"""A model and batches small enough for any test."""

from typing import Any

import numpy as np
import torch
from torch import nn

from lcl_ds.assembly import slot_tokens
from lcl_ds.batch import Batch, Readouts
from lcl_ds.config import RECIPES, Config, load_config
from lcl_ds.data.documents import Document
from lcl_ds.data.sequences import DocumentView, Sequencer
from lcl_ds.data.stream.packing import PackedSequence, Row, collate
from lcl_ds.models.build import build_model
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import NAMES, lcl, view_of
from lcl_ds.tokens import Vocabulary, encode_sequence

VOCABULARY = Vocabulary(text_size=60)
IMAGE_SIZE, IMAGE_TOKENS, ROW_TOKENS = 16, 4, 48

SIZES = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2"
DECODERS = {
    "llama": f"{{model_type: llama, {SIZES}}}",
    "gpt2": "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2}",
    "mistral": f"{{model_type: mistral, {SIZES}}}",
    "qwen2": f"{{model_type: qwen2, {SIZES}}}",
    "qwen3": f"{{model_type: qwen3, {SIZES}, head_dim: 16}}",
    "gemma": f"{{model_type: gemma, {SIZES}, head_dim: 16}}",
    "gemma2": f"{{model_type: gemma2, {SIZES}, head_dim: 16}}",
    "gemma3_text": f"{{model_type: gemma3_text, {SIZES}, head_dim: 16}}",
    "opt": "{model_type: opt, hidden_size: 32, ffn_dim: 48, num_hidden_layers: 2, num_attention_heads: 2}",
}

TOWER = f"hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, image_size: {IMAGE_SIZE}, patch_size: 8"
VISION_TOWERS = {
    "clip_vision_model": f"{{model_type: clip_vision_model, intermediate_size: 64, {TOWER}}}",
    "siglip_vision_model": f"{{model_type: siglip_vision_model, intermediate_size: 64, {TOWER}}}",
    "siglip2_vision_model": f"{{model_type: siglip2_vision_model, intermediate_size: 64, {TOWER}}}",
    "dinov2": f"{{model_type: dinov2, mlp_ratio: 2, {TOWER}}}",
}


OBJECTIVES = {name: [f"objective.name={name}"] for name in NAMES} | {
    "lcl, sigmoid": ["objective.contrastive=sigmoid"],
    "lcl, a document's images are positives": ["objective.same_document=positive"],
    "lcl, matching": ["objective.matching=estimated", "model.logit_scale_init=4"],
}
"""Overrides by what they train."""


def small_config(*overrides: str, decoder: str = "llama") -> Config:
    """The demo recipe with towers of two layers and width 32."""
    return load_config(
        RECIPES / "demo.yaml",
        [
            "data.demo=null",
            f"data.row_tokens={ROW_TOKENS}",
            f"model.vision={VISION_TOWERS['clip_vision_model']}",
            "model.pooling.num_attention_heads=2",
            f"model.decoder={DECODERS[decoder]}",
            "train.warmup_steps=2",
            *overrides,
        ],
    )


def small_model(config: Config | None = None) -> LCLModel:
    return build_model((config or small_config()).model, VOCABULARY.size, ROW_TOKENS, seed=0)


@torch.no_grad()
def shake(*modules: nn.Module, scale: float = 0.1, seed: int = 0) -> None:
    """Move every weight by noise, so that none has its first value."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for weight in module.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)


def sequence(segments: list[str | int], seed: int = 0) -> PackedSequence:
    """A document whose words become one token per letter and whose images are noise."""
    rng = np.random.default_rng(seed)
    (tokens,) = encode_sequence(segments, lambda t: [ord(c) % 60 for c in t], VOCABULARY, IMAGE_TOKENS, ROW_TOKENS, 9)
    shape = (len(tokens.slots), 3, IMAGE_SIZE, IMAGE_SIZE)
    tokens = DocumentView().annotate(tokens, VOCABULARY)
    return PackedSequence(f"test/{seed}", tokens, rng.integers(0, 256, shape, dtype=np.uint8))


def batch_of(*rows: list[PackedSequence]) -> Batch:
    return collate([Row(tuple(row)) for row in rows], ROW_TOKENS, IMAGE_SIZE, VOCABULARY, DocumentView.readout_names)


def objective_batch(config: Config, *rows: list[Document], seed: int = 0) -> Batch:
    """Documents in rows, seen as the objective of ``config`` sees them; images are noise."""
    rng = np.random.default_rng(seed)
    view = view_of(config.objective, image_first_probability=0.5)
    image_tokens = slot_tokens(config)
    sequencer = Sequencer(lambda text: [ord(c) % 60 for c in text], VOCABULARY, image_tokens, ROW_TOKENS, 9)
    packed = []
    for row in rows:
        sequences = []
        for document in row:
            for tokens in view.encode(document, sequencer, rng):
                pixels = rng.integers(0, 256, (len(tokens.images), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
                seeds = tuple(rng.integers(1 << 63, size=len(tokens.images)).tolist())
                sequences.append(PackedSequence(document.key, tokens, pixels, seeds))
        packed.append(Row(tuple(sequences)))
    return collate(packed, ROW_TOKENS, IMAGE_SIZE, VOCABULARY, view.readout_names)


def three_documents(config: Config, seed: int = 0) -> Batch:
    """Three rows of one document with one image each, for any objective."""
    documents = [
        Document("first", ("abc", 0, "d"), ("0.jpg",)),
        Document("second", ("efg", 0), ("0.jpg",)),
        Document("third", ("hi", 0), ("0.jpg",)),
    ]
    return objective_batch(config, *([document] for document in documents), seed=seed)


def lcl_objective(model: LCLModel, contrastive_weight: float = 0.1, generation_weight: float = 1.0, **settings: Any):
    weights = {"contrastive_weight": contrastive_weight, "generation_weight": generation_weight}
    return lcl.Objective(model, lcl.Settings(**weights, **settings))


def batch_with_images(seed: int = 0) -> Batch:
    """Two rows, four documents, five images of which four have context."""
    return batch_of(
        [sequence(["abc", 0, "de"], seed), sequence([0, "fgh", 1, "i"], seed + 1)],
        [sequence(["jkl", 0], seed + 2), sequence(["mn", 0, "op"], seed + 3)],
    )


def batch_without_images(seed: int = 0) -> Batch:
    """Two rows of text only."""
    return batch_of([sequence(["abcdefgh"], seed)], [sequence(["ijklmnopqrs"], seed + 1)])


def merged(*batches: Batch) -> Batch:
    """Batches of several ranks as the one batch that a single process would see."""
    rows = sum(len(b.input_ids) for b in batches)
    slots, readouts, labels_at, bounds = [], [], [], []
    row_offset = image_offset = 0
    for b in batches:
        tokens = row_offset * ROW_TOKENS
        bounds.append(b.cu_seqlens[:-1] + tokens)
        if b.image_count:
            slots.append((b.slot_positions + tokens, b.slot_images + image_offset))
        readouts.append(
            {n: (r.positions + tokens, r.images + image_offset, r.documents) for n, r in b.readouts.items()}
        )
        labels_at.append(b.label_positions + tokens)
        row_offset += len(b.input_ids)
        image_offset += b.image_count
    images, seeds = (torch.cat([getattr(b, n)[: b.image_count] for b in batches]) for n in ("images", "image_seeds"))
    if image_offset == 0:
        images, seeds = batches[0].images, batches[0].image_seeds
        slots = [(torch.tensor([rows * ROW_TOKENS]), torch.tensor([0]))]
    slot_positions, slot_images = (torch.cat(tensors) for tensors in zip(*slots, strict=True))
    return Batch(
        input_ids=torch.cat([b.input_ids for b in batches]),
        position_ids=torch.cat([b.position_ids for b in batches]),
        cu_seqlens=torch.cat([*bounds, torch.tensor([rows * ROW_TOKENS], dtype=torch.int32)]),
        max_seqlen=max(b.max_seqlen for b in batches),
        images=images,
        image_seeds=seeds,
        slot_images=slot_images,
        slot_positions=slot_positions,
        readouts={
            name: Readouts(*(torch.cat(tensors) for tensors in zip(*(r[name] for r in readouts), strict=True)))
            for name in readouts[0]
        },
        label_positions=torch.cat(labels_at),
        labels=torch.cat([b.labels for b in batches]),
        image_count=image_offset,
        document_count=sum(b.document_count for b in batches),
        token_count=sum(b.token_count for b in batches),
        token_squares=sum(b.token_squares for b in batches),
        skipped_samples=0,
        keys=tuple(key for b in batches for key in b.keys),
        pieces=tuple(piece for b in batches for piece in b.pieces),
        sources=batches[0].sources,
    )
