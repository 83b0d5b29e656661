"""Settings of training: the ``train``, ``checkpoint`` and ``log`` parts of a recipe."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from lcl_ds.models.settings import Part
from lcl_ds.settings import Settings

Tracker = Literal["tensorboard", "wandb", "trackio", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab"]
"""Experiment trackers, by the names that accelerate gives them."""
TRACKER_EXTRAS = ("tensorboard", "wandb", "trackio")
"""Trackers that are extras of this package, as in ``pip install 'lcl_ds[tensorboard]'``."""


class TrainSettings(Settings):
    """Optimisation."""

    steps: int = Field(gt=0, description="Optimizer steps of the whole run.")
    image_sizes: dict[int, int] | None = Field(
        None,
        description="Side of the images in pixels by the step from which on it holds, as in {0: 112, 9000: 224}; the "
        "last one is model.vision.image_size. Positions are resized in between. null: one size.",
    )
    seed: int = Field(0, ge=0, description="Seed of everything that has no seed of its own.")
    init_seed: int | None = Field(None, ge=0, description="Seed of the initial weights.")
    data_seed: int | None = Field(None, ge=0, description="Seed of document order and packing.")
    augmentation_seed: int | None = Field(None, ge=0, description="Seed of crops and of image-first draws.")
    global_batch_rows: int = Field(gt=0, description="Packed rows per optimizer step, over all ranks.")
    accumulation_steps: int = Field(
        1,
        gt=0,
        description="Micro-steps per optimizer step. Rows per rank and micro-step follow from it, so a run computes "
        "the same losses on any number of ranks; negatives are the images of one micro-step of all ranks.",
    )
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate (paper: 5e-4 on LAION, 3e-4 on MMC4).")
    min_learning_rate: float = Field(0.0, ge=0, description="Learning rate at the end of the cosine.")
    warmup_steps: int = Field(2000, ge=0, description="Applied steps of linear warm-up.")
    learning_rate_factors: dict[Part, float] = Field(
        default_factory=dict, description="By part, what its learning rate is multiplied with; 0 freezes the part."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw; or muon for the matrices of the towers' blocks and of the pooling, with the same learning "
        "rate and decay, and adamw for all else.",
    )
    muon_rms: float = Field(
        0.2,
        gt=0,
        description="Root mean square of a matrix's update under Muon, before the learning rate; AdamW's is 0.2 to 0.4 "
        "in long runs and nearer to 1 in short ones.",
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Decay of Muon's momentum.")
    weight_decay: float = Field(0.2, ge=0, description="Decay of matrices; none on norms, biases, positions, scale.")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW betas.")
    eps: float = Field(1e-6, gt=0, description="AdamW epsilon.")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay, per applied step, of an exponential moving average of the vision tower, which is evaluated "
        "beside it and which convert --ema releases (4 bytes per weight, spread over the ranks); null: none.",
    )
    compile: bool = Field(
        False,
        description="Compile the blocks of both towers with torch.compile: faster steps after a minute or two of "
        "compiling at each start. Results differ by rounding.",
    )
    gradient_clipping: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 switches clipping off.")
    max_skipped_steps: int = Field(10, gt=0, description="Skipped steps in a row after which the run stops.")
    spike_factor: float = Field(
        10.0,
        gt=1,
        description="A step is a spike when its gradient norm is more than this many times the usual one, or its loss "
        "more than this many usual deviations above the usual one; usual: the median of the last 100 applied steps.",
    )
    on_spike: Literal["warn", "skip", "rollback"] = Field(
        "warn",
        description="warn: say so, with the documents. skip: also leave the update out, where the norm is the spike. "
        "rollback: go back to the newest checkpoint and pass over the rows of the step.",
    )
    max_rollbacks: int = Field(3, gt=0, description="Rollbacks to one checkpoint after which the run stops.")
    start_hang_seconds: float = Field(
        1800.0, gt=0, description="Seconds without progress, until the first step or in a save, after which a run ends."
    )
    hang_seconds: float = Field(
        600.0,
        gt=0,
        description="The same from the first step on, by micro-step; waiting for data does not count.",
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainSettings":
        if self.global_batch_rows % self.accumulation_steps:
            raise ValueError("global_batch_rows must be a multiple of accumulation_steps")
        if any(not factor >= 0 for factor in self.learning_rate_factors.values()):
            raise ValueError("learning_rate_factors must not be negative")
        if len(self.learning_rate_factors) == 4 and not any(self.learning_rate_factors.values()):
            raise ValueError("learning_rate_factors are all 0: nothing would train")
        if self.ema_decay is not None and self.learning_rate_factors.get("vision") == 0:
            raise ValueError("ema_decay: the vision tower is frozen by learning_rate_factors, so there is no average")
        sizes = self.image_sizes
        if sizes is not None and (min(sizes, default=1) != 0 or max(sizes) >= self.steps or min(sizes.values()) < 1):
            raise ValueError("image_sizes: sizes by step, of which the first step is 0 and all are before train.steps")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate is larger than learning_rate")
        return self


class CheckpointSettings(Settings):
    """Saving."""

    every: int = Field(500, gt=0, description="Save after the optimizer steps that this divides, and the last one.")
    keep: int = Field(3, gt=0, description="Newest complete checkpoints to keep.")
    keep_every: int | None = Field(
        None, gt=0, description="Keep the checkpoints of steps that this divides as well, for good; null: none."
    )
    keep_best: str | None = Field(
        None,
        description="Keep as well the checkpoint with the best figure of this name on held-out documents, as "
        "generation_loss or linear/LABEL; checkpoints/best names it. Needs evaluation.every; null: none.",
    )
    asynchronous: bool = Field(
        True,
        description="Write while training goes on, from a copy in host memory (12 bytes per weight, spread over the "
        "ranks); false: training waits, and no copy is made.",
    )
    ignore_damaged: bool = Field(
        False,
        description="Begin anew in a run folder whose checkpoints are all damaged or gone; what is there is renamed.",
    )


class LogSettings(Settings):
    """What is shown; metrics.jsonl always has every step."""

    every: int = Field(10, gt=0, description="Steps between printed lines where there is no terminal.")
    profile_steps: tuple[int, int] | None = Field(
        None,
        description="First and last step of which torch's profiler makes a trace, in the run's folder profile/, and a "
        "table of costs by part of a step; null: none.",
    )
    profile_ranks: Literal["first", "all"] = Field("first", description="Which ranks write a trace of these steps.")
    trackers: list[Tracker] = Field(
        default_factory=list,
        description="Experiment trackers that get every metric as well: tensorboard (into the run folder), wandb, "
        "trackio, ... . One that fails is left out; metrics.jsonl has everything.",
    )

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError("the first step is 1, and the last one is not before the first")
        return steps

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: list[Tracker]) -> list[Tracker]:
        if len(set(trackers)) != len(trackers):
            raise ValueError("a tracker is named twice")
        return trackers
