"""Settings of a study: a YAML file in ``launch/studies``."""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from lcl_ds.config import Config, load_config, recipe_path
from lcl_ds.errors import UserError
from lcl_ds.evaluation.encoder import Kind
from lcl_ds.evaluation.tasks import TASKS
from lcl_ds.files import read_yaml, shipped_file, shipped_folder
from lcl_ds.settings import Settings, suggest

STUDIES = shipped_folder("launch/studies")

Encoder = Literal["trained", "average", "untrained"]
Overrides = dict[str, Any]
"""Settings of a recipe by dotted name."""
NAME = re.compile(r"\w[\w.]*")
"""Names of variants are parts of names of files; what is crossed is joined by a hyphen."""


class Measurement(Settings):
    """One call of the evaluation."""

    tasks: list[str] = Field(min_length=1, description="Tasks of lcl_ds.evaluate.")
    data: str | list[str] | None = Field(None, description="What is tested on. None: the recipe's evaluation.shards.")
    labels: list[str] = Field(default_factory=list, description="Labels to predict. None: evaluation.probe_labels.")
    features: list[Kind] = Field(default_factory=list, description="Features of the encoder. None: all that it has.")
    prompts: list[str] = Field(default_factory=list, description="Texts of zeroshot, with {} for the class.")
    epochs: int | None = Field(None, ge=1, description="Of what is trained. None: each task's own.")

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"there is no task {task!r}{suggest(task, TASKS)}; there are {', '.join(TASKS)}")
        return tasks

    @field_validator("prompts")
    @classmethod
    def _with_place(cls, prompts: list[str]) -> list[str]:
        if lacking := [prompt for prompt in prompts if "{}" not in prompt]:
            raise ValueError(f"{lacking[0]!r} lacks {{}}, where the name of the class goes")
        return prompts


class Study(Settings):
    """Variants of one recipe, each trained with every seed at every budget."""

    title: str = Field(min_length=1, description="Heading on the page.")
    question: str = Field(min_length=1, description="What it is to find out.")
    notes: list[str] = Field(default_factory=list, description="What a reader must know to read the figures.")
    recipe: str = Field(description="Recipe that all variants change: a name or a YAML file.")
    ds_config: str = Field("zero1", description="Engine settings: a name or a JSON file.")
    ranks: int = Field(1, ge=1, description="Ranks of each run.")
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1, description="train.seed of the runs.")
    budgets: list[int] = Field(
        default_factory=list, description="Images that a run sees. None: as many steps as the settings say."
    )
    match: Literal["images", "flops"] = Field(
        "images",
        description="What variants spend alike. flops: a budget is the images of the first variant, and the others "
        "take as many steps as cost the same training arithmetic.",
    )
    warmup: float | None = Field(
        None, ge=0, lt=1, description="Warm-up as a fraction of a run's steps. None: the recipe's steps of warm-up."
    )
    overrides: Overrides = Field(default_factory=dict, description="Settings of all variants.")
    variants: dict[str, Overrides] = Field(min_length=1, description="Settings of each variant; the first is compared.")
    crossed_with: dict[str, Overrides] = Field(
        default_factory=dict, description="Further settings: every variant is run with each of them."
    )
    encoders: list[Encoder] = Field(
        default=["trained"],
        min_length=1,
        description="What is measured. untrained: the first weights, which the seed alone decides, so that only the "
        "first variant's are measured, at the first budget.",
    )
    measurements: list[Measurement] = Field(min_length=1, description="What the encoders are measured by.")
    columns: list[str] = Field(
        default_factory=lambda: ["*"],
        min_length=1,
        description="Figures in tables and charts, as patterns of task/label/features/metric.",
    )

    @field_validator("variants", "crossed_with")
    @classmethod
    def _names_of_files(cls, variants: dict[str, Overrides]) -> dict[str, Overrides]:
        for name in variants:
            if not NAME.fullmatch(name):
                raise ValueError(f"the name {name!r} may have letters, digits, _ and dots alone")
        return variants

    @field_validator("seeds", "budgets")
    @classmethod
    def _each_once(cls, numbers: list[int]) -> list[int]:
        if len(set(numbers)) != len(numbers):
            raise ValueError("a number stands there twice")
        if any(number < 0 for number in numbers):
            raise ValueError("a number is negative")
        return numbers

    @model_validator(mode="after")
    def _budget_to_match(self) -> "Study":
        if self.match == "flops" and not self.budgets:
            raise ValueError("match=flops needs budgets: the images that the first variant sees")
        return self

    def all_variants(self) -> dict[str, Overrides]:
        """List the settings of every variant, crossed ones too, by name."""
        if not self.crossed_with:
            return {name: self.overrides | own for name, own in self.variants.items()}
        pairs = product(self.variants.items(), self.crossed_with.items())
        return {f"{one}-{other}": self.overrides | first | second for (one, first), (other, second) in pairs}


def study_path(name_or_path: str) -> Path:
    """Find a study's file from its name (``objectives``) or path.

    Raises:
        UserError: there is no such file.
    """
    return shipped_file("study", name_or_path, STUDIES, "studies")


def load_study(path: Path) -> Study:
    """Read and validate a study.

    Raises:
        UserError: with every problem found, each naming file and key.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a mapping of settings is expected, found {type(tree).__name__}")
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        raise UserError([_sentence(e, path) for e in error.errors()]) from None


def _sentence(error: Any, path: Path) -> str:
    key = ".".join(str(step) for step in error["loc"] if not str(step).startswith(("list[", "str")))
    match error["type"]:
        case "extra_forbidden":
            model = Measurement if error["loc"][0] == "measurements" else Study
            return f"{path}: {key}: unknown setting{suggest(str(error['loc'][-1]), model.model_fields)}"
        case "missing":
            return f"{path}: {key}: missing"
        case "value_error":
            return f"{path}: {key}{': ' if key else ''}{error['ctx']['error']}"
        case "literal_error" if "features" in error["loc"]:
            return f"{path}: {key}: there is no {error['input']!r}; there are {', '.join(get_args(Kind))}"
        case _:
            return f"{path}: {key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def arguments_of(overrides: Overrides) -> list[str]:
    """Write settings as the command line takes them."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def config_of(study: Study, path: Path, variant: str) -> Config:
    """Resolve the settings of a variant.

    Raises:
        UserError: names the study's file, the variant and the key.
    """
    try:
        return load_config(recipe_path(study.recipe), arguments_of(study.all_variants()[variant]))
    except UserError as error:
        raise UserError(
            [f"{path}: variant {variant}: {p.removeprefix('command line: ')}" for p in error.problems]
        ) from None
