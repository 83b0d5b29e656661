"""Write the model card of a release."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from lcl_ds.evaluation.results import IN_PERCENT, shown
from lcl_ds.files import printable
from lcl_ds.flops import size_of
from lcl_ds.models.build import native_resolution
from lcl_ds.models.network import LCLModel
from lcl_ds.release.options import ReleaseOptions
from lcl_ds.release.origin import WeightOrigin
from lcl_ds.release.record import RunRecord

HEAD = """\
# {name}: LCL {network}

A {network} pre-trained by Latent Compression Learning ([arXiv 2406.07543](https://arxiv.org/abs/2406.07543))
{history}: {parameters:,} parameters, {size} px images, patches of {patch} px.
Licence of the weights: {license}.
"""
NO_LICENSE = "not stated; ask whoever released them"
LIMITS = """\
## Intended use and limits

Features of images: for probes and classifiers, for retrieval, and as the eye of a multimodal model, each trained on
top.

- {sizes}
- It knows what its training data shows, with their gaps, mistakes and prejudices, and nobody measured these. Do not use
  it to identify people or to decide about them.
- What is not in the table of figures was not measured.
"""
SQUARES = "It was trained with squares of {size} px. Other sizes need resized positions and were not checked."
NATIVE = """\
It was trained with whole images in their own aspect ratio, of {least} to {most} patches; its positions were resized to
  each image, as its transformers class does it{how}. What is checked and measured here are squares of {size} px."""
CITATION = """\
## Citation

```bibtex
@article{yang2024vision,
  title={Vision Model Pre-training on Interleaved Image-Text Data via Latent Compression Learning},
  author={Yang, Chenyu and Zhu, Xizhou and Zhu, Jinguo and Su, Weijie and Wang, Junjie and Dong, Xuan and Wang, Wenhai
          and Li, Bin and Zhou, Jie and Qiao, Yu and Dai, Jifeng},
  journal={arXiv preprint arXiv:2406.07543},
  year={2024}
}
```
"""
ABOUT_FIGURES = """\
On the run's held-out documents, at the step of these weights. `head` is the attentive pooling, `mean` the mean patch
token.
"""
CLASSIFYING = ("linear", "attentive", "knn", "fewshot", "finetune")
"""Tasks that Hugging Face calls image classification."""


def write_card(
    folder: Path,
    model: LCLModel,
    origin: WeightOrigin,
    options: ReleaseOptions,
    usage: str,
    checked: str,
    library: str = "transformers",
    *,
    is_whole: bool = False,
) -> None:
    """Write ``README.md``.

    Args:
        usage: how to load the folder.
        checked: one sentence about the comparison with the training model.
        library: that loads the folder, as Hugging Face names it.
        is_whole: whether decoder and heads are in the folder too.
    """
    encoder, record = model.vision.model, origin.record
    # A pooling that was not trained is not released either.
    figures = [row for row in record.figures if origin.pools or row.get("features") != "head"]
    facts = ModelCardData(
        library_name=library,
        pipeline_tag="image-feature-extraction",
        tags=["lcl", "vision", encoder.config.model_type],
        license=options.license,
        # Hugging Face's model-index; the name belongs to it.
        model_name=printable(origin.name) if figures else None,
        eval_results=[_eval_result(row) for row in figures] or None,
    )
    head = HEAD.format(
        name=printable(origin.name),
        history=origin.history,
        network="vision encoder with its decoder" if is_whole else "vision encoder",
        parameters=size_of((model if is_whole else encoder).parameters()),
        size=encoder.config.image_size,
        patch=encoder.config.patch_size,
        license=options.license or NO_LICENSE,
    )
    sections = [
        f"---\n{facts.to_yaml()}\n---\n{head}",
        f"## Use\n\n{usage}\nChecked when it was written: {checked}.\n",
        _training(record, origin.settings),
        _figures(figures, options, record.no_figures),
        LIMITS.format(sizes=_sizes(encoder.config, origin)),
        CITATION,
    ]
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8", errors="backslashreplace")


def _sizes(config: Any, origin: WeightOrigin) -> str:
    """Say which images the encoder was trained with."""
    native = origin.config and native_resolution(origin.config.model)
    if not native:
        return SQUARES.format(size=config.image_size)
    # The other classes resize positions whenever an image has another shape.
    is_asked = config.model_type in ("clip_vision_model", "siglip_vision_model")
    how = " (`interpolate_pos_encoding=True`)" if is_asked else ""
    return NATIVE.format(least=native.least, most=native.most, size=config.image_size, how=how)


def _training(record: RunRecord, settings: dict[str, Any]) -> str:
    """Say what it was trained on, with what and how."""
    lines = ["## Training", ""]
    if record.sources:
        lines += ["| source | documents | images |", "|---|---|---|"]
        for name, counts in record.sources.items():
            lines.append(f"| {_cell(name)} | {counts['documents']:,} | {counts['images']:,} |")
        lines.append("")
    seen = [f"{count:,} {kind}" for kind, count in (("images", record.images), ("tokens", record.tokens)) if count]
    if seen:
        lines.append(
            f"Seen: {' and '.join(seen)}, each as often as it was drawn. Sources have the names of the recipe."
        )
    else:
        lines.append("How much data it has seen is not recorded.")
    if record.hardware and record.hours is not None:
        lines.append(f"Steps took {_duration(record.hours)} on {printable(record.hardware)}.")
    if record.commit:
        lines.append(f"Code: lcl_ds at commit {printable(record.commit)}.")
    chosen = yaml.safe_dump(_without_unset(settings), sort_keys=False, allow_unicode=True)
    return "\n".join([*lines, "", "Settings:", "", f"```yaml\n{chosen}```", ""])


def _without_unset(settings: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _without_unset(value) if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: value for key, value in nested.items() if value not in (None, {}, [])}


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.1f} seconds"


def _figures(figures: list[dict[str, Any]], options: ReleaseOptions, reason: str) -> str:
    """Write the table of figures, or why there is none."""
    if not figures:
        return f"## Evaluation\n\n{reason}\n"
    rows = ["| task | features | label | metric | value | 95 % interval | chance | samples |", "|---" * 8 + "|"]
    for row in figures:
        metric = str(row["metric"])
        unit = " %" if metric.startswith(IN_PERCENT) else ""
        ends = [shown(row[end], metric) for end in ("low", "high") if row.get(end) is not None]
        cells = [row.get("task"), row.get("features"), row.get("label"), metric.replace("_", " ")]
        cells += [
            shown(row["value"], metric) + unit,
            " to ".join(ends),
            shown(row.get("chance"), metric),
            row.get("count"),
        ]
        rows.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    about = ABOUT_FIGURES + (
        f"They were measured before the weights became {options.dtype}.\n" if options.dtype != "fp32" else ""
    )
    return "\n".join(["## Evaluation", "", about, *rows, ""])


def _cell(value: Any) -> str:
    return "" if value is None else printable(str(value)).replace("|", "\\|")


def _eval_result(row: dict[str, Any]) -> EvalResult:
    """Write a figure as an entry of Hugging Face's model-index."""
    task, metric = str(row.get("task")), str(row["metric"])
    words = [str(row[key]) for key in ("task", "features", "label") if row.get(key)]
    return EvalResult(
        task_type="image-classification" if task in CLASSIFYING else task,
        task_name=printable(" ".join(words)),
        dataset_type="held-out",
        dataset_name=printable(str(row.get("dataset", "held-out documents"))),
        metric_type=printable(metric),
        metric_value=row["value"],
    )
