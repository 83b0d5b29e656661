"""The tree of settings of one run: YAML file plus ``key.sub=value`` overrides, validated at once."""

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from lcl_ds.data.settings import DataSettings
from lcl_ds.errors import UserError
from lcl_ds.evaluation.settings import EvaluationSettings
from lcl_ds.files import shipped_file, shipped_folder
from lcl_ds.models.settings import READ_FOLDERS, ModelSettings
from lcl_ds.objectives import NAMES, objective_module, settings_classes
from lcl_ds.objectives.base import ObjectiveSettings
from lcl_ds.settings import Settings, suggest
from lcl_ds.training.settings import CheckpointSettings, LogSettings, TrainSettings

logger = logging.getLogger(__name__)

RECIPES = shipped_folder("launch/recipes")
DS_CONFIGS = shipped_folder("ds_configs")


if TYPE_CHECKING:
    AnyObjective = ObjectiveSettings
else:
    AnyObjective = Annotated[Union[settings_classes()], Field(discriminator="name")]  # noqa: UP007


class Config(Settings):
    """One whole run."""

    name: str = Field(min_length=1, description="Name of the recipe; the default run folder is runs/<name>.")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="Arithmetic of the towers; losses are fp32.")
    data: DataSettings
    model: ModelSettings
    objective: AnyObjective = Field(default_factory=lambda: {"name": "lcl"}, validate_default=True)
    train: TrainSettings
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)

    @field_validator("objective", mode="before")
    @classmethod
    def _lcl_unless_named(cls, value: Any) -> Any:
        return {"name": "lcl", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _best_is_measured(self) -> "Config":
        best, every = self.checkpoint.keep_best, self.evaluation.every
        if best is None:
            return self
        if self.evaluation.shards is None or every is None or self.checkpoint.every % every:
            raise ValueError(
                "checkpoint.keep_best: checkpoints must be evaluated; set evaluation.shards, and evaluation.every to a "
                f"number that divides checkpoint.every {self.checkpoint.every}"
            )
        losses = objective_module(self.objective.name).Objective.losses
        names = [*losses, *self.evaluation.names("contrastive_loss" in losses)]
        if best not in names:
            raise ValueError(f"checkpoint.keep_best: {best!r} is not measured; there are {', '.join(names)}")
        return self

    def seed(self, purpose: Literal["init", "data", "augmentation"]) -> int:
        """Return the seed of one purpose; ``train.seed`` where it has none of its own."""
        own = getattr(self.train, f"{purpose}_seed")
        return self.train.seed if own is None else own


def recipe_path(name_or_path: str) -> Path:
    """Find a recipe's file from its name (``demo``) or path.

    Raises:
        UserError: there is no such file.
    """
    return shipped_file("recipe", name_or_path, RECIPES, "recipes")


def ds_config_path(name_or_path: str) -> Path:
    """Find a DeepSpeed configuration's file from its name (``zero3``) or path; whether it can be read is seen later.

    Raises:
        UserError: there is no such name.
    """
    shipped, path = DS_CONFIGS / f"{name_or_path}.json", Path(name_or_path)
    if shipped.is_file():
        return shipped
    if path.suffix != ".json" and not path.exists():
        known = ", ".join(sorted(p.stem for p in DS_CONFIGS.glob("*.json")))
        raise UserError(f"--ds_config {name_or_path}: there is no such file; shipped configurations: {known}")
    return path


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read and validate a recipe.

    What a recipe says of its objective is for that one alone: where ``objective.name`` is overridden by another, it is
    left out, and named in the log. A weight of LCL's is none of CoCa's.

    Args:
        path: a YAML file.
        overrides: ``key.sub=value``, the value in YAML.

    Raises:
        UserError: with every problem found, each naming file and key.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a mapping of settings is expected, found {type(tree).__name__}")
    parsed = dict(map(_parse_override, overrides or []))
    _drop_other_objective(tree, parsed.get("objective.name"), str(path))
    for key, value in parsed.items():
        _set(tree, key.split("."), value, key)
    return validate_config(tree, str(path), parsed, READ_FOLDERS)


def validate_config(
    tree: dict[str, Any], origin: str, overrides: dict[str, Any] | None = None, context: Any = None
) -> Config:
    """Validate a tree of plain values; ``origin`` names it in messages.

    Raises:
        UserError: with every problem found.
    """
    try:
        return Config.model_validate(tree, context=context)
    except ValidationError as error:
        raise UserError([_sentence(e, origin, overrides or {}) for e in error.errors()]) from None


def _parse_override(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"{text!r}: an override is written key.sub=value")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{text!r}: the value is not valid YAML") from None


def _drop_other_objective(tree: dict[str, Any], wanted: Any, origin: str) -> None:
    """Remove the settings of a recipe's objective where ``wanted`` is another one."""
    given = tree.get("objective")
    if not isinstance(given, dict) or wanted not in NAMES or (own := given.get("name", "lcl")) == wanted:
        return
    dropped = [f"objective.{key}" for key in given if key != "name"]
    tree["objective"] = {}
    if dropped:
        _tell(f"{origin}: {', '.join(dropped)}: of {own}, and left out for {wanted}")


@cache
def _tell(text: str) -> None:
    """Log a sentence once, for a study reads its recipe many times."""
    logger.info("%s", text)


def _set(tree: dict[str, Any], keys: list[str], value: Any, whole: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"{whole}: {key} is a single value, it has no settings below it")
    tree[keys[-1]] = value


def _sentence(error: Any, origin: str, overrides: dict[str, Any]) -> str:
    keys = [str(step) for step in error["loc"] if not str(step).startswith(("function-", "list[", "constrained-"))]
    branch = keys.pop(1) if keys[:1] == ["objective"] and len(keys) > 1 else ""  # pydantic names the union's member
    key = ".".join(keys)
    is_override = any(key == k or key.startswith(f"{k}.") or k.startswith(f"{key}.") for k in overrides)
    where = "command line" if is_override else origin
    match error["type"]:
        case "extra_forbidden":
            return f"{where}: {key}: unknown setting{suggest(keys[-1], _fields_at(keys[:-1], branch))}"
        case "missing":
            return f"{where}: {key}: missing"
        case "value_error":
            return f"{where}: {key}: {error['ctx']['error']}" if key else f"{where}: {error['ctx']['error']}"
        case "union_tag_invalid":
            name = error["ctx"]["tag"]
            return f"{where}: {key}.name: there is no {name!r}{suggest(name, NAMES)}; there are {', '.join(NAMES)}"
        case _:
            return f"{where}: {key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _fields_at(keys: list[str], objective: str) -> list[str]:
    """List the names of the settings below ``keys``; those of ``objective`` below that key."""
    model: Any = Config
    for key in keys:
        if key.isdigit():
            continue
        annotation = model.model_fields[key].annotation
        models = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")]
        model = next((m for m in models if key == "objective" and _name_of(m) == objective), models[0])
    return list(model.model_fields)


def _name_of(objective: Any) -> str:
    return objective.model_fields["name"].default
