"""Evaluate a run at its end on held-out documents: probes, and retrieval of contexts by images."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lcl_ds.cli import USER_ERROR, problems_of
from lcl_ds.config import Config
from lcl_ds.evaluation.documents import HeldOut, HeldOutReader
from lcl_ds.evaluation.encoder import FrozenEncoder, of_network
from lcl_ds.evaluation.features import patches_of_pixels, vectors_of_pixels
from lcl_ds.evaluation.gazes import pooling_gazes
from lcl_ds.evaluation.held_out import NAME, PATCH_BYTES, PROBES, Labelled, splits_of
from lcl_ds.evaluation.probe import BASELINE_ITERATIONS, ITERATIONS, linear_probe, pixel_features
from lcl_ds.evaluation.probes import Split
from lcl_ds.evaluation.results import Figure
from lcl_ds.evaluation.retrieval import (
    LEAST_PAIRS,
    PairFeatures,
    pair_features,
    retrieval_figures,
    retrieval_scores,
    too_few_pairs,
)
from lcl_ds.files import write_whole
from lcl_ds.models.build import build_empty_model
from lcl_ds.models.initial import fill_weights
from lcl_ds.models.network import LCLModel
from lcl_ds.models.placement import device_of, place
from lcl_ds.objectives import trained_losses
from lcl_ds.report.evaluation import caveats, column_of, probe_kinds
from lcl_ds.report.examples import RETRIEVAL_PICTURE, Examples, write_pictures
from lcl_ds.report.figures import RetrievalExample, plot_retrieval
from lcl_ds.report.page import is_current, write_report
from lcl_ds.report.run import EVALUATION
from lcl_ds.tokens import TextTokenizer

logger = logging.getLogger(__name__)

WIDTH = 120
"""Columns where the output is no terminal."""
EXAMPLES = 5
"""Retrieved documents in the picture."""


def close_run(
    config: Config,
    run_dir: Path,
    step: int,
    load_model: Callable[[], LCLModel],
    load_average: Callable[[], LCLModel] | None = None,
) -> int:
    """Evaluate the run's last checkpoint and write the report, as far as either is older than the checkpoint.

    The report is written also when the evaluation fails, and says why.

    Args:
        step: of the last checkpoint.
        load_model: the network of that checkpoint, where it can be evaluated.
        load_average: the same with the moving average of the vision tower, if the run keeps one.

    Returns:
        Exit code: 0, or another one when the evaluation failed.
    """
    code = 0
    if config.evaluation.shards is not None and not _is_evaluated(config, run_dir, step):
        code = _evaluate(config, run_dir, step, load_model, load_average)
    if not is_current(run_dir):
        logger.info("report: %s", write_report([run_dir]))
    return code


def _is_evaluated(config: Config, run_dir: Path, step: int) -> bool:
    """Say whether ``evaluation.json`` is of this step and of these settings."""
    try:
        results = json.loads((run_dir / EVALUATION).read_bytes())
    except (OSError, ValueError):  # a damaged file is made again
        return False
    done = {"step": step, "settings": config.evaluation.model_dump(mode="json")}
    return isinstance(results, dict) and "failed" not in results and all(results.get(key) == done[key] for key in done)


def _evaluate(
    config: Config,
    run_dir: Path,
    step: int,
    load_model: Callable[[], LCLModel],
    load_average: Callable[[], LCLModel] | None,
) -> int:
    """Write ``evaluation.json`` with figures, or with the reason why there are none; returns an exit code."""
    code = 0
    picture = run_dir / RETRIEVAL_PICTURE
    results: dict[str, Any] = {"step": step, "settings": config.evaluation.model_dump(mode="json")}
    try:
        picture.parent.mkdir(exist_ok=True)
        picture.unlink(missing_ok=True)  # of an earlier step
        average = load_average() if load_average else None
        examples = Examples()
        results |= evaluate_model(load_model(), config, examples, average)
        write_pictures(run_dir, step, examples)
        if examples.retrieval:
            plot_retrieval(examples.retrieval, picture)
    except Exception as error:  # whatever it is, the run keeps its report
        problems = problems_of(error)
        logger.error(
            "the final evaluation failed: %s; the trained weights are safe, and the same command evaluates again",
            "; ".join(problems) if problems else "see below",
            exc_info=None if problems else error,
        )
        results["failed"] = "; ".join(problems) if problems else f"{type(error).__name__}: {error}"
        code = USER_ERROR if problems else 1
    write_whole(run_dir / EVALUATION, json.dumps(results, indent=2) + "\n")
    if not code:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        if (table := final_table(results)).row_count:
            console.print(table)
        for sentence in caveats(results):
            console.print(sentence, markup=False, highlight=False)
    return code


def evaluate_model(
    model: LCLModel, config: Config, examples: Examples | None = None, average: LCLModel | None = None
) -> dict[str, Any]:
    """Compute probe and retrieval figures of a trained model.

    Args:
        examples: collects what can be shown in pictures, if anybody wants it.
        average: the same with the moving average of its vision tower, to be probed as well.

    Returns:
        ``documents`` and ``images`` that were used, ``left_out`` (what was not, by reason), ``notes`` (a sentence about
        each figure that is missing), ``figures`` (see :class:`lcl_ds.evaluation.results.Figure`), ``probe`` per label:
        accuracies of the columns of :data:`lcl_ds.report.evaluation.PROBE_KINDS`, and where the objective has
        contrastive pairs ``retrieval`` (see :func:`lcl_ds.evaluation.retrieval.retrieval_scores`).

    Raises:
        UserError: held-out shards that cannot be read any more.
    """
    tokenizer = TextTokenizer(config.data.tokenizer)
    reader = HeldOutReader(config, tokenizer)
    held_out = reader.read_all()
    probes, figures, notes = _probes(model, config, held_out, tokenizer.vocabulary.size, average)
    results: dict[str, Any] = {
        "documents": held_out.document_count,
        "images": len(held_out.pixels),
        "left_out": dict(held_out.left_out.most_common()),
        "probe": probes,
        "figures": [figure.row() for figure in figures],
        "notes": notes,
    }
    if examples is not None and "contrastive_loss" in trained_losses(config.objective):  # which trains the query
        examples.gazes += pooling_gazes(model, held_out.pixels)
    if reader.rows is None or "retrieval" not in config.evaluation.tasks:
        return results
    count = reader.pair_count(sequence.tokens for sequence in held_out.sequences)
    if count < LEAST_PAIRS:
        notes.append(too_few_pairs(count))
        return results
    rows = reader.rows
    pairs = pair_features(model, held_out.sequences, tokenizer.vocabulary, rows.row_tokens, rows.row_images)
    results["retrieval"] = retrieval_scores(pairs.image, pairs.context)
    results["figures"] += [figure.row() for figure in retrieval_figures(pairs.image, pairs.context, NAME)]
    if examples is not None:
        examples.retrieval += _examples(pairs, tokenizer)
    return results


def _probes(
    model: LCLModel, config: Config, held_out: HeldOut, vocab_size: int, average: LCLModel | None
) -> tuple[dict[str, dict[str, float]], list[Figure], list[str]]:
    """Compute accuracies by label and column, figures of the trained model, and a sentence about what is missing."""
    splits, notes = splits_of(config.evaluation.probe_labels, held_out.labels, held_out.is_test)
    tasks = [task for task in PROBES if task in config.evaluation.tasks]
    if not splits or not tasks:
        return {}, [], notes
    encoder = of_network(model, "trained")
    vectors = vectors_of_pixels(encoder, held_out.pixels)
    if not all(values.isfinite().all() for values in vectors.values()):
        return {}, [], [*notes, "probes are left out: the trained encoder's features are not finite"]
    vectors.pop("class", None)  # no loss reads it; lcl evaluate does
    trained = Labelled(splits, vectors, lambda: patches_of_pixels(encoder, held_out.pixels, PATCH_BYTES))
    figures = [figure for task in tasks for figure in PROBES[task](trained)]
    probes = {split.label: {"chance": split.chance} for split in splits}
    for figure in figures:
        if (column := column_of(figure.task, figure.features)) and figure.label:
            probes[figure.label][column] = figure.value
    if "linear" in tasks:
        for name, features in _others(model, config, held_out, vocab_size, average, notes):
            iterations = BASELINE_ITERATIONS if name == "raw_pixels" else ITERATIONS
            for split in splits:
                probes[split.label][name] = _accuracy(features, split, iterations)
    return probes, figures, notes


def _others(
    model: LCLModel, config: Config, held_out: HeldOut, vocab_size: int, average: LCLModel | None, notes: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Give the mean patch tokens of what the trained encoder is compared with, by column."""
    if average is not None:
        averaged = _mean_tokens(of_network(average, "average"), held_out)
        if averaged.isfinite().all():
            yield "ema", averaged
        else:
            notes.append("the moving average is left out: its features are not finite")
    untrained = build_empty_model(config.model, vocab_size, config.data.longest_document).eval()
    fill_weights(untrained, config.seed("init"), within=["vision"])
    place(untrained.vision, device_of(model))
    yield "untrained", _mean_tokens(of_network(untrained, "untrained", with_head=False), held_out)
    yield "raw_pixels", pixel_features(held_out.pixels)


def _mean_tokens(encoder: FrozenEncoder, held_out: HeldOut) -> Tensor:
    return vectors_of_pixels(encoder, held_out.pixels)["mean"]


def _accuracy(features: Tensor, split: Split, iterations: int) -> float:
    return linear_probe(features, split.classes, split.train, split.test, iterations=iterations).accuracy


def _examples(pairs: PairFeatures, tokenizer: TextTokenizer) -> list[RetrievalExample]:
    """Choose contexts spread over the held-out set, with the images that they rank first."""
    chosen = np.unique(np.linspace(0, len(pairs.context) - 1, EXAMPLES).round().astype(int))
    ranked = (pairs.context[chosen] @ pairs.image.T).argsort(dim=1, descending=True)[:, :5]
    return [
        RetrievalExample(
            context=_readable(tokenizer.decode(pairs.context_ids[i].tolist())),
            images=[pairs.pixels[j].transpose(1, 2, 0) for j in images],
            correct=[j == i for j in images],
        )
        for i, images in zip(chosen.tolist(), ranked.tolist(), strict=True)
    ]


def _readable(context: str, characters: int = 160) -> str:
    """Shorten a context to its end, with each image as one word."""
    text = re.sub(r"<start_of_image>( <image>)+ <end_of_image>", "[image]", context).replace("<start_of_text> ", "")
    return text if len(text) <= characters else "... " + text[-characters:].split(" ", 1)[-1]


def final_table(results: dict[str, Any]) -> Table:
    """Make a table of the figures for the terminal."""
    table = Table(title=f"Held-out: {results['documents']} documents, {results['images']} images")
    kinds = probe_kinds(results)
    for column in ("", *kinds.values()):
        table.add_column(column, justify="left" if not column else "right")
    for label, scores in results["probe"].items():
        cells = [f"{scores[kind]:.1%}" if kind in scores else "" for kind in kinds]
        table.add_row(Text(f"probe: {label}"), *cells)
    if retrieval := results.get("retrieval"):
        values = {"trained": f"{retrieval['recall_at_1']:.1%}", "chance": f"{retrieval['chance']:.2%}"}
        table.add_row(
            f"image-to-context R@1 of {retrieval['pairs']}",
            *(values.get(kind, "") for kind in kinds),
        )
        values = {"trained": f"{retrieval['reverse']['recall_at_1']:.1%}", "chance": f"{retrieval['chance']:.2%}"}
        table.add_row(
            f"context-to-image R@1 of {retrieval['pairs']}",
            *(values.get(kind, "") for kind in kinds),
        )
    return table
