"""Run folders and their metrics."""

import json
from pathlib import Path
from typing import Any

from lcl_ds.metrics import METRICS, SourceCounts, StepMetrics, read_metrics

MEASURED = {
    *("step_s", "data_s", "images_per_s", "tokens_per_s", "mfu", "memory_gb"),
    *("slowest_rank", "slowest_rank_s", "median_rank_s", "evaluation_s"),
}
"""Keys whose values no two runs share."""


def metrics_of(run_dir: Path) -> list[dict]:
    return read_metrics(run_dir) if (run_dir / METRICS).exists() else []


def without_timing(metrics: list[dict]) -> list[dict]:
    return [{key: value for key, value in step.items() if key not in MEASURED} for step in metrics]


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "loss": 3.0,
        "contrastive_loss": 4.0 / step,
        "generation_loss": 2.0,
        "logit_scale": 14.3,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "images": 100,
        "documents": 40,
        "tokens": 3000,
        "text_tokens": 2000,
        "token_squares": 300_000,
        "padding_fraction": 0.25,
        "images_per_s": 200.0,
        "tokens_per_s": 6000.0,
        "step_s": 0.5,
        "data_s": 0.05,
        "skipped_samples": 1,
        "applied": True,
    }
    return row | changes


def step_metrics(step: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "losses": {"loss": 2.1, "contrastive_loss": 1.0, "generation_loss": 2.0},
        "reports": {"logit_scale": 14.0},
        **{
            "grad_norm": 1.0,
            "lr": 1e-3,
            "images": 8,
            "image_tokens": 128,
            "documents": 4,
            "tokens": 90,
            "text_tokens": 60,
            "token_squares": 900,
        },
        **{"padding_fraction": 0.1, "images_per_s": 16.4, "tokens_per_s": 180.6, "step_s": 10.0, "data_s": 0.1},
        **{"skipped_samples": 0, "sources": {"web": SourceCounts(4, 8)}, "applied": True},
    }
    return StepMetrics(step=step, **values | changes)


def make_run(folder: Path, steps: int = 4) -> Path:
    folder.mkdir(parents=True)
    rows = [metrics(step) for step in range(1, steps)]
    rows.append(metrics(steps, loss=None, contrastive_loss=None, generation_loss=None, grad_norm=None, applied=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"name: <b>demo</b>\ntrain:\n  steps: {steps}\n  seed: 0\n")
    (folder / "environment.json").write_text('{"gpu": "A & B"}')
    return folder
