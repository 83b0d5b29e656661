"""Settings of the evaluation: the ``evaluation`` part of a recipe."""

from pydantic import Field

from lcl_ds.settings import Settings


class EvaluationSettings(Settings):
    """The final evaluation on held-out documents."""

    shards: str | list[str] | None = Field(None, description="Held-out document shards; none: no final evaluation.")
    probe_labels: list[str] = Field(default_factory=list, description="Per-image labels that linear probes predict.")
    max_documents: int = Field(1000, gt=1, description="Documents used.")
