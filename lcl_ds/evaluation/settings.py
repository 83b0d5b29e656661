"""Settings of the evaluation: the ``evaluation`` part of a recipe."""

from typing import Literal

from pydantic import Field, field_validator

from lcl_ds.settings import Settings

Task = Literal["linear", "attentive", "knn", "retrieval"]
STANDARD: tuple[Task, ...] = ("linear", "attentive", "retrieval")
ENDS: dict[Task, tuple[str, ...]] = {"linear": ("", "/mean"), "knn": ("", "/mean"), "attentive": ("",)}
"""How the names of a probe's figures end: of the pooling head, and of the mean patch token."""


RECALLS = ("retrieval/recall_at_1", "retrieval/recall_at_10")


class EvaluationSettings(Settings):
    """The evaluation on held-out documents, at the end of a run and while it trains."""

    shards: str | list[str] | None = Field(None, description="Held-out document shards; none: no evaluation.")
    probe_labels: list[str] = Field(default_factory=list, description="Per-image labels that probes predict.")
    max_documents: int = Field(1000, gt=1, description="Documents used at the end.")
    tasks: list[Task] = Field(
        default_factory=lambda: list(STANDARD),
        description="What is measured: linear and attentive probe and knn of each label, retrieval of contexts by "
        "images.",
    )
    every: int | None = Field(
        None,
        gt=0,
        description="Optimizer steps between evaluations during training, which also give the losses on held-out "
        "documents; null: only at the end.",
    )
    documents_in_training: int = Field(256, gt=1, description="Documents used during training.")
    max_seconds: float = Field(
        60.0, gt=0, description="Longest time that one evaluation during training reads and encodes documents."
    )

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: list[Task]) -> list[Task]:
        if len(set(tasks)) != len(tasks):
            raise ValueError("a task is named twice")
        return tasks

    def names(self, has_pairs: bool) -> list[str]:
        """Name the figures of an evaluation during training, beside the losses of the objective.

        Args:
            has_pairs: whether the objective pairs images with contexts.
        """
        probes = [task for task in self.tasks if task != "retrieval"]
        of_labels = [f"{task}/{label}{end}" for label in self.probe_labels for task in probes for end in ENDS[task]]
        return of_labels + (list(RECALLS) if has_pairs and "retrieval" in self.tasks else [])
