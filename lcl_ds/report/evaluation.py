"""Say what ``evaluation.json`` holds, as bars and sentences."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lcl_ds.errors import UserError
from lcl_ds.report.bars import Bar, Bars, Range
from lcl_ds.report.numbers import is_number, percent
from lcl_ds.report.run import EVALUATION, Run

PROBE_KINDS = {
    "trained": "trained",
    "head": "pooled",
    "attentive": "attentive",
    "knn": "k-NN",
    "ema": "EMA",
    "untrained": "untrained",
    "raw_pixels": "raw pixels",
    "chance": "chance",
}
"""Columns of the probes, as ``evaluation.json`` and as people name them. ``head`` is the linear probe of the attentive
pooling head, ``attentive`` the attentive probe of the patch tokens, ``knn`` the neighbours by the head; the others are
linear probes of the mean patch token."""
ALWAYS = ("trained", "untrained", "raw_pixels", "chance")
BASELINES = {"untrained": "untrained encoder", "raw_pixels": "raw pixels"}
READ = {
    "trained": "mean patch token",
    "head": "pooling head",
    "attentive": "attentive probe",
    "knn": "k-NN, pooling head",
    "ema": "moving average (EMA)",
}
"""What of the trained encoder each column reads."""
RECALLS = (1, 5, 10)
WAYS = {"image_to_context": "Image to context", "context_to_image": "Context to image"}


@dataclass(frozen=True)
class Shown:
    """The final evaluation of a run, as far as there is one."""

    facts: str
    """What it was done on."""
    missing: str
    """Why there is none."""
    bars: list[Bars]
    notes: list[str]


def probe_kinds(results: dict[str, Any]) -> dict[str, str]:
    """Name the columns of the probes of an evaluation: some only where there is something in them."""
    scores = list((results.get("probe") or {}).values())
    return {kind: shown for kind, shown in PROBE_KINDS.items() if kind in ALWAYS or any(kind in s for s in scores)}


def column_of(task: str, features: str | None) -> str | None:
    """Say in which column of the table a figure stands; None: in none, it is only written down."""
    columns = {("linear", "mean"): "trained", ("linear", "head"): "head", ("attentive", "patches"): "attentive"}
    return columns.get((task, features or ""), "knn" if features == "head" else None)


def caveats(results: dict[str, Any]) -> list[str]:
    """Say what an evaluation leaves out: figures that are missing, samples that were not used."""
    sentences = list(results.get("notes", []))
    left_out = ", ".join(f"{reason} ({count:,})" for reason, count in (results.get("left_out") or {}).items())
    if left_out:
        sentences.append(f"left out: {left_out}")
    return sentences


def shown_evaluation(run: Run) -> Shown:
    """Say what the final evaluation of a run found, or why there is none.

    Raises:
        UserError: the file holds something else.
    """
    results = run.evaluation
    try:
        if not results or "failed" in results:
            return Shown("", _why_missing(run), [], [])
        notes = [f"{sentence[:1].upper()}{sentence[1:]}" for sentence in caveats(results)]
        return Shown(_facts(run), "", [*_probe_bars(results), *_retrieval_bars(results)], notes)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        raise UserError(
            f"{run.folder / EVALUATION}: holds no figures as an evaluation writes them; evaluate the run again or "
            "remove the file"
        ) from None


def _facts(run: Run) -> str:
    results = run.evaluation
    facts = [f"{results[unit]:,} {unit}" for unit in ("documents", "images") if unit in results]
    if "step" in results:
        facts.append(f"after step {results['step']:,}")
        if results["step"] < run.last_step:
            facts.append(f"before the run went on to step {run.last_step:,}")
    return f"Held out: {', '.join(facts)}" if facts else ""


def _why_missing(run: Run) -> str:
    """Say why a run has no figures of an evaluation; empty where its folder does not say."""
    if "failed" in run.evaluation:
        return f"It failed after step {run.evaluation.get('step', run.last_step):,}: {run.evaluation['failed']}"
    if "evaluation.shards" not in run.settings:
        return ""
    if run.settings["evaluation.shards"] == "None":
        return "There is none: evaluation.shards names no held-out documents."
    if run.planned_steps and run.last_step < run.planned_steps:
        return f"There is none yet: it follows the last of {run.planned_steps:,} steps."
    return "There is none yet: the command that trained the run makes it."


def _intervals(results: dict[str, Any]) -> dict[tuple[str, ...], Range]:
    """Find the confidence intervals: of probes by label and column, of retrieval by way and metric."""
    intervals: dict[tuple[str, ...], Range] = {}
    for figure in results.get("figures", []):
        if not (is_number(figure.get("low")) and is_number(figure.get("high"))):
            continue
        task = figure["task"]
        if task.startswith("retrieval "):
            key: tuple[str, ...] = (task.removeprefix("retrieval "), figure["metric"])
        else:
            key = (figure.get("label", ""), column_of(task, figure.get("features")) or "")
        intervals[key] = figure["low"], figure["high"]
    return intervals


def _probe_bars(results: dict[str, Any]) -> Iterator[Bars]:
    intervals = _intervals(results)
    for label, scores in (results.get("probe") or {}).items():
        names = {**READ, **BASELINES}
        bars = [
            Bar(
                names[kind],
                scores[kind],
                percent(scores[kind]),
                intervals.get((label, kind)),
                is_baseline=kind in BASELINES,
            )
            for kind in names
            if is_number(scores.get(kind))
        ]
        chance = scores["chance"] if is_number(scores.get("chance")) else None
        yield Bars(label, bars, 1.0, chance, _verdict(bars, chance))


def _verdict(bars: list[Bar], chance: float | None) -> list[str]:
    """Say in a sentence whether the trained encoder does better than what it is compared with."""
    own = {bar.value: bar for bar in bars if not bar.is_baseline and bar.value is not None}
    others = {bar.name: bar.value for bar in bars if bar.is_baseline and bar.value is not None}
    if chance is not None:
        others["guessing"] = chance
    if not own or not others:
        return []
    best = max(own)
    name = max(others, key=lambda other: others[other])
    points = 100 * (best - others[name])
    guess = f" Guessing the most frequent class: {percent(chance)}." if chance is not None else ""
    low, _ = own[best].interval or (best, best)
    if points <= 0:
        return [f"No better than {name} ({percent(others[name])}).{guess}"]
    certain = "" if low > others[name] else " That is within the error of the measurement."
    return [f"Best: {own[best].name}, {points:.1f} points above {name} ({percent(others[name])}).{certain}{guess}"]


def _retrieval_bars(results: dict[str, Any]) -> Iterator[Bars]:
    retrieval = results.get("retrieval") or {}
    intervals = _intervals(results)
    bars, sentences = [], []
    pairs, chance = retrieval.get("pairs", 0), retrieval.get("chance")
    for way, scores in zip(WAYS, (retrieval, retrieval.get("reverse") or {}), strict=True):
        recalls = {k: scores.get(f"recall_at_{k}") for k in RECALLS}
        bars += [
            Bar(f"{WAYS[way]}, first {k}", value, percent(value), intervals.get((way, f"recall_at_{k}")))
            for k, value in recalls.items()
            if is_number(value)
        ]
        if is_number(scores.get("median_rank")):
            sentences.append(f"{WAYS[way]}: median rank {scores['median_rank']:,.0f} of {pairs:,}.")
    if is_number(chance):
        sentences.append(f"Guessing ranks {percent(chance)} first.")
    if bars:
        yield Bars(f"Retrieval, {pairs:,} pairs", bars, 1.0, None, [" ".join(sentences)])


def headline_figures(results: dict[str, Any]) -> dict[str, tuple[float, Range | None]]:
    """List the accuracies and recalls of the trained network by a label of each, with their intervals."""
    intervals = _intervals(results)
    figures: dict[str, tuple[float, Range | None]] = {}
    for label, scores in (results.get("probe") or {}).items():
        for kind, shown in READ.items():
            if is_number(scores.get(kind)):
                figures[f"{label}: {shown}"] = scores[kind], intervals.get((label, kind))
    retrieval = results.get("retrieval") or {}
    for way, scores in zip(WAYS, (retrieval, retrieval.get("reverse") or {}), strict=True):
        for k in RECALLS:
            if is_number(scores.get(f"recall_at_{k}")):
                name = f"{WAYS[way]}: recall at {k}"
                figures[name] = scores[f"recall_at_{k}"], intervals.get((way, f"recall_at_{k}"))
    return figures
