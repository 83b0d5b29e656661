"""The closing evaluation of a run on held-out documents: linear probes and image-to-context retrieval."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from lcl_ds.config import Config
from lcl_ds.data.views import Encoder
from lcl_ds.evaluation.documents import HeldOut, read_held_out
from lcl_ds.evaluation.probe import encoder_features, linear_probe, pixel_features
from lcl_ds.evaluation.retrieval import PairFeatures, pair_features, retrieval_scores
from lcl_ds.models.build import build_model, image_size, tokens_per_image
from lcl_ds.models.lcl import LCLModel
from lcl_ds.objectives import objective_module, view_of
from lcl_ds.plots import RetrievalExample, plot_retrieval
from lcl_ds.tokens import TextTokenizer

EXAMPLES = 5
"""Retrieved documents in the picture."""


def evaluate_model(model: LCLModel, config: Config, picture: Path | None = None) -> dict[str, Any]:
    """Probe and retrieval figures of a trained model.

    Args:
        model: in evaluation mode, on any device.
        config: of its run; ``evaluation.shards`` must be set.
        picture: where to draw retrieved images, if anywhere.

    Returns:
        ``documents``, ``images``, ``probe`` per label (accuracy ``trained``, ``untrained``, ``raw_pixels``,
        ``chance``) and, where the objective has contrastive pairs, ``retrieval`` (see
        :func:`lcl_ds.evaluation.retrieval.retrieval_scores`).
    """
    assert config.evaluation.shards is not None
    tokenizer = TextTokenizer(config.data.tokenizer)
    vocabulary, data = tokenizer.vocabulary, config.data
    view = view_of(config.objective, data.image_first_probability)
    encoder = Encoder(
        tokenizer.encode, vocabulary, tokens_per_image(config.model), data.longest_document, data.row_images
    )
    limit = config.evaluation.max_documents
    held_out = read_held_out(config.evaluation.shards, view, encoder, image_size(config.model), limit)
    results = {
        "documents": held_out.document_count,
        "images": len(held_out.pixels),
        "probe": _probes(model, config, held_out, vocabulary.size),
    }
    if "contrastive_loss" in objective_module(config.objective.name).Objective.losses:
        pairs = pair_features(model, held_out.sequences, vocabulary, view, data.row_tokens, data.row_images)
        results["retrieval"] = retrieval_scores(pairs.image, pairs.context)
        if picture is not None:
            plot_retrieval(_examples(pairs, tokenizer), picture)
    return results


def _probes(model: LCLModel, config: Config, held_out: HeldOut, vocab_size: int) -> dict[str, dict[str, float]]:
    untrained = build_model(config.model, vocab_size, config.data.row_tokens, config.seed("init")).eval()
    features = {
        "trained": encoder_features(model.vision, held_out.pixels),
        "untrained": encoder_features(untrained.vision, held_out.pixels),
        "raw_pixels": pixel_features(held_out.pixels),
    }
    # Two thirds of the documents train the probe, the rest test it: images of one document stay on one side.
    is_test = torch.from_numpy(held_out.document_of_image % 3 == 0)
    results = {}
    for name in config.evaluation.probe_labels:
        values = [label.get(name) for label in held_out.labels]
        known = torch.tensor([value is not None for value in values])
        names = sorted({str(value) for value in values if value is not None})
        classes = torch.tensor([names.index(str(value)) if value is not None else 0 for value in values])
        train, test = (known & ~is_test).nonzero().squeeze(1), (known & is_test).nonzero().squeeze(1)
        scores = {kind: linear_probe(f, classes, train, test) for kind, f in features.items()}
        chance = float(torch.bincount(classes[test]).max() / len(test))
        results[name] = {**scores, "chance": chance}
    return results


def _examples(pairs: PairFeatures, tokenizer: TextTokenizer) -> list[RetrievalExample]:
    """Contexts spread over the held-out set with the images they rank first."""
    ranked = (pairs.context @ pairs.image.T).argsort(dim=1, descending=True)[:, :5]
    chosen = np.linspace(0, len(ranked) - 1, EXAMPLES).round().astype(int)
    return [
        RetrievalExample(
            context=_readable(tokenizer.decode(pairs.context_ids[i].tolist())),
            images=[pairs.pixels[j].transpose(1, 2, 0) for j in ranked[i].tolist()],
            correct=[j == i for j in ranked[i].tolist()],
        )
        for i in chosen.tolist()
    ]


def _readable(context: str, characters: int = 160) -> str:
    """The end of a context, each image as one word."""
    text = re.sub(r"<start_of_image>( <image>)+ <end_of_image>", "[image]", context).replace("<start_of_text> ", "")
    return text if len(text) <= characters else "... " + text[-characters:].split(" ", 1)[-1]


def closing_table(results: dict[str, Any]) -> Table:
    """The figures as a table for the terminal."""
    table = Table(title=f"Held-out: {results['documents']} documents, {results['images']} images")
    for column in ("", "trained", "untrained", "raw pixels", "chance"):
        table.add_column(column, justify="left" if not column else "right")
    for label, scores in results["probe"].items():
        cells = [f"{scores[kind]:.1%}" for kind in ("trained", "untrained", "raw_pixels", "chance")]
        table.add_row(f"linear probe: {label}", *cells)
    if retrieval := results.get("retrieval"):
        table.add_row(
            f"image-to-context R@1 of {retrieval['pairs']}",
            f"{retrieval['recall_at_1']:.1%}",
            "",
            "",
            f"{retrieval['chance']:.2%}",
        )
    return table
