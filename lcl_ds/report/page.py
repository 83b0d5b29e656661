"""The page about a run.

It reads what the run folder holds, draws the figures into ``plots/`` and writes one HTML file that needs nothing else:
figures are embedded, so the page can be mailed or archived. Several runs give a page that compares them.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml

from lcl_ds.errors import UserError
from lcl_ds.files import check_output, printable, write_whole
from lcl_ds.metrics import METRICS, Row, loss_names, read_metrics
from lcl_ds.report.figures import (
    Runs,
    column,
    evaluated_rows,
    plot_evaluation,
    plot_losses,
    plot_schedule,
    plot_throughput,
)

REPORT, EVALUATION, RETRIEVAL_PICTURE = "report.html", "evaluation.json", "plots/retrieval.png"
"""Files of a run folder."""
FIGURES = {
    "losses": (plot_losses, "Losses, unweighted. Faint: every step; strong: moving average."),
    "evaluation": (plot_evaluation, "Held-out documents, evaluated during training."),
    "schedule": (plot_schedule, "Learning rate, gradient norm before clipping, and what else the objective reports."),
    "throughput": (plot_throughput, "Throughput of the whole run, over all ranks."),
}
RETRIEVAL_CAPTION = (
    "Contexts and the images they rank first among all held-out images. Green frame: the image that follows the "
    "context; a row without one ranks it lower."
)
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
LAST_STEPS = 20
"""Steps that the final losses are averaged over."""
ABSENT = "-"

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
$state
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1f2933; --muted: #616e7c; --page: #f5f7fa; --card: #ffffff; --line: #e1e6eb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ecf0; --muted: #9aa7b4; --page: #14181d; --card: #1d232a; --line: #313a44; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .8rem; font-size: 1.15rem; }
.sub, figcaption, .note { color: var(--muted); font-size: .9rem; }
.sub { margin: .2rem 0 1.5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; margin: 0; }
.cards div, figure, details, .table { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.cards div { display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: .7rem .9rem; }
.cards dt { color: var(--muted); font-size: .8rem; }
.cards dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; }
.table + .table { margin-top: .8rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .9rem; text-align: right; }
th { font-weight: 500; white-space: nowrap; }
th:first-child { text-align: left; }
thead th { color: var(--muted); font-size: .85rem; }
tbody tr { border-top: 1px solid var(--line); }
figure { margin: 0 0 1rem; padding: .8rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: .35rem; }
figcaption { margin-top: .6rem; }
details { margin-bottom: .7rem; padding: .7rem .9rem; }
summary { cursor: pointer; font-weight: 500; }
pre { margin: .7rem 0 0; overflow-x: auto; font: .82rem/1.45 ui-monospace, SFMono-Regular, Menlo, monospace; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="sub">$subtitle</p>
$body
</body>
</html>
""")


def write_report(run_dirs: list[Path], out: Path | None = None) -> Path:
    """Draw the figures of a run and write its page, or a page that compares several runs.

    Args:
        run_dirs: run folders. One: figures go to ``RUN/plots``, the page to ``RUN/report.html``. Several: the page
            goes to ``comparison.html`` in the first, and no run's own figures are touched.
        out: another file for the page; figures of a comparison go to ``plots`` beside it.

    Returns:
        Path of the page.

    Raises:
        UserError: a run folder without a recorded step or with an unreadable file.
    """
    folders = _by_name(run_dirs)
    runs = _read_all(folders)
    first = run_dirs[0]
    single = len(folders) == 1
    page = out or first / (REPORT if single else "comparison.html")
    check_output("--out", page)

    # Everything that can be wrong with a file is found before anything is drawn.
    evaluation = _evaluations(folders, runs)
    differences = "" if single else _setting_differences(folders)
    figures = []
    for name, (draw, caption) in FIGURES.items():
        if name == "evaluation" and not any(evaluated_rows(rows) for rows in runs.values()):
            continue
        path = first / "plots" / f"{name}.png" if single else page.parent / "plots" / f"{page.stem}_{name}.png"
        draw(runs, path)
        figures.append(_figure(path, caption))
    body = [_key_figures(runs), evaluation, "<h2>Training</h2>", *figures, *_retrieval(folders)]
    body += [differences, _files(folders)]
    title = next(iter(folders)) if single else "Comparison: " + ", ".join(folders)
    subtitle = "Latent Compression Learning, training run" if single else "Latent Compression Learning, training runs"
    state = _state(first, next(iter(runs.values()))) if single else ""
    content = "\n".join(filter(None, body))
    write_whole(page, PAGE.substitute(title=escape(title), state=state, subtitle=subtitle, body=content))
    return page


def is_current(run_dir: Path) -> bool:
    """Say whether the run's page shows its last recorded step and its evaluation as they are now.

    Raises:
        UserError: the run has no readable metrics.
    """
    page = run_dir / REPORT
    if not page.is_file():
        return False
    return _state(run_dir, read_metrics(run_dir)) in page.read_text(encoding="utf-8", errors="replace")


def _state(folder: Path, rows: list[Row]) -> str:
    """Make an invisible mark in a run's page that says what the page was made from."""
    path = folder / EVALUATION
    evaluation = f"{zlib.crc32(path.read_bytes()):08x}" if path.is_file() else "none"
    step = rows[-1]["step"] if rows else 0
    return f'<meta name="lcl-state" content="step {step}, evaluation {evaluation}">'


def key_figures(rows: list[Row]) -> dict[str, str]:
    """Sum up what was done, written for a reader, by the label to show with it; ``rows`` must not be empty."""

    def total(key: str) -> float:
        return float(np.nansum(column(rows, key)))

    def final(key: str) -> str:
        values = column(rows[-LAST_STEPS:], key)
        return f"{np.nanmean(values):.3f}" if np.isfinite(values).any() else ABSENT

    seconds = total("step_s")
    padding = column(rows, "padding_fraction")
    last = f"mean of last {min(LAST_STEPS, len(rows))} steps"
    figures = {
        "Steps": f"{rows[-1]['step']:,}",
        "Images": _count(total("images")),
        "Documents": _count(total("documents")),
        "Tokens": _count(total("tokens")),
        "Time in steps": _duration(seconds),
        "Mean tokens per second": _count(total("tokens") / seconds) if seconds else ABSENT,
        "Mean images per second": _count(total("images") / seconds) if seconds else ABSENT,
        "Padding": _percent(np.nanmean(padding) if np.isfinite(padding).any() else None),
        "Samples skipped": f"{total('skipped_samples'):,.0f}",
        "Steps not applied": f"{sum(row.get('applied') is False for row in rows):,}",
        **{f"{name.replace('_', ' ').capitalize()}, {last}": final(name) for name in loss_names(rows[-1])},
    }
    utilisation, memory = column(rows, "mfu"), column(rows, "memory_gb")
    if np.isfinite(utilisation).any():
        figures["Model FLOPs utilisation"] = _percent(np.nanmean(utilisation))
    if np.isfinite(memory).any():
        figures["Peak memory"] = f"{np.nanmax(memory):.1f} GiB"
    return figures


def _by_name(run_dirs: Iterable[Path]) -> dict[str, Path]:
    """Name each run folder once, by as much of the end of its path as distinguishes it from the others."""
    folders = {path.resolve(): path for path in run_dirs}
    depths = range(1, max(len(folder.parts) for folder in folders) + 1)
    by_depth = ({"/".join(folder.parts[-depth:]): path for folder, path in folders.items()} for depth in depths)
    names = next(names for names in by_depth if len(names) == len(folders))
    return {printable(name): path for name, path in names.items()}


def _read_all(folders: dict[str, Path]) -> Runs:
    runs, problems = {}, []
    for name, folder in folders.items():
        try:
            runs[name] = read_metrics(folder)
            if not runs[name]:
                problems.append(f"{folder / METRICS}: holds no complete step yet; let the run do at least one")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return runs


def _key_figures(runs: Runs) -> str:
    figures = {name: key_figures(rows) for name, rows in runs.items()}
    if len(runs) == 1:
        cards = (
            f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in next(iter(figures.values())).items()
        )
        return f'<dl class="cards">{"".join(cards)}</dl>'
    labels = dict.fromkeys(label for of_run in figures.values() for label in of_run)
    rows = [[label, *(of_run.get(label, ABSENT) for of_run in figures.values())] for label in labels]
    return "<h2>Key figures</h2>" + _table(["", *runs], rows)


def _evaluations(folders: dict[str, Path], runs: Runs) -> str:
    results = {name: _evaluation(folder) for name, folder in folders.items()}
    if len(folders) == 1:
        ((name, result),) = results.items()
        last_step = runs[name][-1]["step"]
        if result and "failed" not in result:
            return _final_evaluation(result, last_step)
        reason = _why_missing(folders[name], result, last_step)
        return f'<h2>Final evaluation</h2><p class="note">{escape(reason)}</p>' if reason else ""
    if not any(results.values()):
        return ""
    cells = {name: _flat_evaluation(result) for name, result in results.items()}
    labels = dict.fromkeys(label for of_run in cells.values() for label in of_run)
    rows = [[label, *(of_run.get(label, ABSENT) for of_run in cells.values())] for label in labels]
    return "<h2>Final evaluation on held-out documents</h2>" + _table(["", *folders], rows)


def _evaluation(folder: Path) -> dict[str, Any]:
    path = folder / EVALUATION
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); evaluate the run again or remove the file") from None
    return results if isinstance(results, dict) else {}


def _why_missing(folder: Path, results: dict[str, Any], last_step: int) -> str:
    """Say why a run has no figures of an evaluation; empty where its folder does not say."""
    if "failed" in results:
        return f"It failed after step {results.get('step', last_step):,}: {results['failed']}"
    settings = _settings(folder / "config.yaml")
    if settings.get("evaluation.shards") == "None":
        return "There is none: evaluation.shards names no held-out documents."
    if "evaluation.shards" not in settings:
        return ""
    if last_step < int(settings.get("train.steps", 0)):
        return f"There is none yet: it follows the last of {int(settings['train.steps']):,} steps."
    return "There is none yet: the command that trained the run makes it."


def caveats(results: dict[str, Any]) -> list[str]:
    """Say what an evaluation leaves out: figures that are missing, samples that were not used."""
    sentences = list(results.get("notes", []))
    left_out = ", ".join(f"{reason} ({count:,})" for reason, count in (results.get("left_out") or {}).items())
    if left_out:
        sentences.append(f"left out: {left_out}")
    return sentences


def _final_evaluation(results: dict[str, Any], last_step: int) -> str:
    blocks = ["<h2>Final evaluation</h2>"]
    facts = [
        f"{results[key]:,} {unit}" for key, unit in (("documents", "documents"), ("images", "images")) if key in results
    ]
    if "step" in results:
        facts.append(f"after step {results['step']:,}")
        if results["step"] < last_step:
            facts.append(f"before the run went on to step {last_step:,}")
    if facts:
        blocks.append(f'<p class="note">Held out: {escape(", ".join(facts))}</p>')
    if probe := results.get("probe"):
        kinds = probe_kinds(results)
        rows = [[f"Probe: {label}", *(_percent(s.get(kind)) for kind in kinds)] for label, s in probe.items()]
        blocks.append(_table(["Accuracy", *kinds.values()], rows))
    if retrieval := results.get("retrieval"):
        head = ["Retrieval", "recall at 1", "recall at 5", "recall at 10", "median rank", "chance (recall at 1)"]
        pairs, chance = f"{retrieval.get('pairs', 0):,} pairs", retrieval.get("chance")
        rows = [[f"Image to context, {pairs}", *_retrieval_cells(retrieval)]]
        if reverse := retrieval.get("reverse"):
            rows.append([f"Context to image, {pairs}", *_retrieval_cells({**reverse, "chance": chance})])
        blocks.append(_table(head, rows))
    blocks += [f'<p class="note">{escape(sentence[:1].upper() + sentence[1:])}</p>' for sentence in caveats(results)]
    return "\n".join(blocks)


def probe_kinds(results: dict[str, Any]) -> dict[str, str]:
    """Name the columns of the probes of an evaluation: some only where there is something in them."""
    scores = list((results.get("probe") or {}).values())
    return {kind: shown for kind, shown in PROBE_KINDS.items() if kind in ALWAYS or any(kind in s for s in scores)}


def _retrieval_cells(retrieval: dict[str, Any]) -> list[str]:
    rank = retrieval.get("median_rank")
    return [
        _percent(retrieval.get("recall_at_1")),
        _percent(retrieval.get("recall_at_5")),
        _percent(retrieval.get("recall_at_10")),
        ABSENT if rank is None else f"{rank:,.0f}",
        _percent(retrieval.get("chance")),
    ]


def _flat_evaluation(results: dict[str, Any]) -> dict[str, str]:
    """Give each figure one label, for a column of a comparison."""
    if "failed" in results:
        return {"Evaluation": "failed"}
    flat = {
        f"Probe: {label}, {shown}": _percent(scores.get(kind))
        for label, scores in (results.get("probe") or {}).items()
        for kind, shown in probe_kinds(results).items()
    }
    if retrieval := results.get("retrieval"):
        names = ("recall at 1", "recall at 5", "recall at 10", "median rank", "chance")
        cells = zip(names, _retrieval_cells(retrieval), strict=True)
        flat |= {f"Image to context, {name}": cell for name, cell in cells}
    return flat


def _retrieval(folders: dict[str, Path]) -> list[str]:
    paths = {name: folder / RETRIEVAL_PICTURE for name, folder in folders.items()}
    pictures = {name: path for name, path in paths.items() if path.is_file()}
    prefix = len(folders) > 1
    figures = [
        _figure(path, f"{name}. {RETRIEVAL_CAPTION}" if prefix else RETRIEVAL_CAPTION)
        for name, path in pictures.items()
    ]
    return ["<h2>What contexts expect to see</h2>", *figures] if pictures else []


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _setting_differences(folders: dict[str, Path]) -> str:
    settings = {name: _settings(folder / "config.yaml") for name, folder in folders.items()}
    keys = sorted({key for of_run in settings.values() for key in of_run})
    rows = [[key, *(of_run.get(key, ABSENT) for of_run in settings.values())] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return "<h2>Settings that differ</h2>" + _table(["", *folders], differing) if differing else ""


def _settings(path: Path) -> dict[str, str]:
    """Read the settings of a run as ``key.sub: text``; empty without the file."""

    def flatten(value: Any, prefix: str) -> dict[str, str]:
        if isinstance(value, dict):
            return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{prefix}.{key}").items()}
        return {prefix[1:]: str(value)}

    if not path.is_file():
        return {}
    try:
        return flatten(yaml.safe_load(path.read_text(encoding="utf-8")), "")
    except yaml.YAMLError:
        raise UserError(f"{path}: is not YAML; restore the file that the run wrote") from None


def _files(folders: dict[str, Path]) -> str:
    blocks = ["<h2>Settings and environment</h2>"]
    for name, folder in folders.items():
        for file in ("config.yaml", "environment.json"):
            if (folder / file).is_file():
                label = escape(file if len(folders) == 1 else f"{name}: {file}")
                text = escape((folder / file).read_text(encoding="utf-8", errors="replace"))
                blocks.append(f"<details><summary>{label}</summary><pre>{text}</pre></details>")
    return "\n".join(blocks) if len(blocks) > 1 else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = (
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    body = "".join(lines)
    return f'<div class="table"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def _count(value: float) -> str:
    """Write a count: 12,345 up to a hundred thousand, then 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return ABSENT
    return f"{100 * value:.2f} %" if 0 < value < 0.01 else f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
