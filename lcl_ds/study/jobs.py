"""Decide what each run of a study reads: rows and steps that spend the same images, or the same arithmetic."""

from dataclasses import dataclass
from pathlib import Path

from lcl_ds.assembly import build_empty, lane_settings
from lcl_ds.config import Config
from lcl_ds.data.corpus import open_data
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.errors import UserError
from lcl_ds.flops import StepFlops, StepWork, total
from lcl_ds.objectives.base import prepare_network
from lcl_ds.plan.contents import RowContents
from lcl_ds.study.settings import Overrides, Study, config_of
from lcl_ds.training.optimizer import freeze_parts

SAMPLED_ROWS = 256
"""Rows of the stream that what a row holds is the mean of."""
AS_IT_STANDS = "recipe"
"""Budget of a study that names none."""


@dataclass(frozen=True)
class Cost:
    """What a variant's rows hold and what they cost."""

    config: Config
    row: RowContents
    flops: StepFlops

    def work(self, rows: int) -> StepWork:
        return self.row.step(rows, self.config.train.accumulation_steps)

    def tflop(self, rows: int) -> float:
        """Return the operations of a step of so many rows, in 10^12, as ``metrics.jsonl`` counts them."""
        return total(self.flops.of(self.work(rows))).model / 1e12


@dataclass(frozen=True)
class Run:
    """One run of a study: what its figures are known by."""

    study: str
    variant: str
    budget: str
    seed: int
    overrides: Overrides
    """Of the study and the variant."""

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.budget}-{self.seed}"


@dataclass(frozen=True)
class Job:
    """A run that is to be made."""

    run: Run
    sizes: Overrides
    """What its budget comes to."""
    images: float | None
    """What it is expected to see; None without a budget, which nothing has to be sampled for."""
    tflop: float | None
    """What it is expected to compute."""


def runs_of(study: Study, path: Path) -> list[Run]:
    """List all runs of a study, the smallest budget first, then by seed."""
    return [
        Run(path.stem, variant, budget, seed, overrides)
        for budget in [budget_name(images) for images in study.budgets] or [AS_IT_STANDS]
        for seed in study.seeds
        for variant, overrides in study.all_variants().items()
    ]


def cost_of(config: Config) -> Cost:
    """Sample the stream of a variant and count what a row of it costs.

    Raises:
        UserError: its data cannot be opened.
    """
    data = open_data(config.data)
    batch = next(BatchLoader(data.sources, lane_settings(config), data.tokenizer, SAMPLED_ROWS))
    objective = build_empty(config, data.tokenizer.vocabulary.size)
    prepare_network(objective)
    freeze_parts(objective, config.train)
    row = RowContents(
        tokens=config.data.row_tokens,
        images=batch.image_count / SAMPLED_ROWS,
        labels=len(batch.labels) / SAMPLED_ROWS,
        pairs=objective.count_terms(batch).get("pairs", 0) / SAMPLED_ROWS,
        squares=batch.token_squares / SAMPLED_ROWS,
        known_from=f"the first {SAMPLED_ROWS} rows of the stream",
    )
    return Cost(config, row, StepFlops(objective))


def budget_name(images: int) -> str:
    """Write a budget as part of a file's name: 16k for 16,000."""
    return f"{images // 1000}k" if images >= 1000 and images % 1000 == 0 else str(images)


def jobs_of(study: Study, path: Path, runs: list[Run]) -> list[Job]:
    """Size runs of a study: rows such that a step has as many images as one of the first variant, and steps.

    Raises:
        UserError: a variant has wrong settings, or its data cannot be opened.
    """
    configs = configs_of(study, path)
    first = next(iter(configs))
    if not study.budgets:
        return [_as_it_stands(study, run, configs[run.variant]) for run in runs]
    costs = _costs(study, path, {variant: configs[variant] for variant in [first, *(run.variant for run in runs)]})
    wanted = costs[first].config.train.global_batch_rows * costs[first].row.images
    return [_sized(study, run, costs[run.variant], costs[first], wanted) for run in runs]


def configs_of(study: Study, path: Path) -> dict[str, Config]:
    """Resolve the settings of every variant.

    Raises:
        UserError: a variant has wrong settings, or nothing to be measured on.
    """
    configs = {variant: config_of(study, path, variant) for variant in study.all_variants()}
    _check_held_out(study, path, configs)
    return configs


def _check_held_out(study: Study, path: Path, configs: dict[str, Config]) -> None:
    """Refuse measurements that know no data. Raises: UserError."""
    for number, measurement in enumerate(study.measurements):
        for variant, config in configs.items():
            if measurement.data is None and config.evaluation.shards is None:
                raise UserError(
                    f"{path}: measurements.{number}.data: is missing, and variant {variant} has no evaluation.shards"
                )


def _costs(study: Study, path: Path, configs: dict[str, Config]) -> dict[str, Cost]:
    """Sample each variant, those that read and compute the same only once."""
    known: dict[str, Cost] = {}
    costs = {}
    for variant, config in configs.items():
        train = config.train
        key = repr((config.data, config.model, config.objective, train.accumulation_steps, train.learning_rate_factors))
        if key not in known:
            try:
                known[key] = cost_of(config)
            except UserError as error:
                raise UserError([f"{path}: variant {variant}: {problem}" for problem in error.problems]) from None
        costs[variant] = known[key]
    return costs


def _sized(study: Study, run: Run, cost: Cost, first: Cost, wanted: float) -> Job:
    """Choose rows and steps of a run.

    Args:
        first: of the first variant.
        wanted: images of a step.
    """
    images = next(budget for budget in study.budgets if budget_name(budget) == run.budget)
    rows, steps = _steps_of(images, cost, wanted)
    if study.match == "flops":
        first_rows, first_steps = _steps_of(images, first, wanted)
        steps = max(1, round(first_steps * first.tflop(first_rows) / cost.tflop(rows)))
    return Job(run, _sizes(study, run, rows, steps), steps * rows * cost.row.images, steps * cost.tflop(rows))


def _as_it_stands(study: Study, run: Run, config: Config) -> Job:
    return Job(run, _sizes(study, run, config.train.global_batch_rows, config.train.steps), None, None)


def _sizes(study: Study, run: Run, rows: int, steps: int) -> Overrides:
    sizes: Overrides = {"train.global_batch_rows": rows, "train.steps": steps, "train.seed": run.seed}
    if study.warmup is not None:
        sizes["train.warmup_steps"] = round(study.warmup * steps)
    return sizes


def _steps_of(images: int, cost: Cost, wanted: float) -> tuple[int, int]:
    """Choose rows of a step that hold about so many images, and steps that see all."""
    rows = max(1, round(wanted / cost.row.images))
    return rows, max(1, round(images / (rows * cost.row.images)))
