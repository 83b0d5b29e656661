"""The tree of settings of one run: YAML file plus ``key.sub=value`` overrides, validated at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from lcl_ds.data.mixing import weight_at
from lcl_ds.errors import UserError
from lcl_ds.models.settings import READ_FOLDERS, ModelSettings, Part
from lcl_ds.objectives import NAMES, settings_classes
from lcl_ds.objectives.common import ObjectiveSettings
from lcl_ds.settings import Settings, suggest

RECIPES = Path(__file__).resolve().parent.parent / "launch" / "recipes"


class SourceSettings(Settings):
    """One source of documents or pairs."""

    name: str = Field(min_length=1, pattern=r"^[^/]*$", description="Name in logs and in resume fingerprints.")
    paths: str | list[str] = Field(
        description="WebDataset tars: path, glob, braces {0000..0099}, URL, pipe:COMMAND, .txt list of them, or a list."
    )
    weight: float | dict[int, float] = Field(
        1.0,
        description="Share of draws relative to the other sources; {0: 1, 5000: 0.5}: by step (a curriculum); "
        "documents that already wait for a row come a few steps late.",
    )

    @field_validator("weight")
    @classmethod
    def _from_the_start(cls, weight: float | dict[int, float]) -> float | dict[int, float]:
        weights = weight if isinstance(weight, dict) else {0: weight}
        if min(weights, default=-1) != 0:
            raise ValueError("by step it must name steps from 0 on")
        if not all(0 <= w < float("inf") for w in weights.values()) or not any(weights.values()):
            raise ValueError("must not be negative, nor 0 throughout")
        return weight


class DataSettings(Settings):
    """Where documents come from and how they become rows."""

    shards: list[SourceSettings] = Field(description="Sources. A plain path or list of paths means weight 1 each.")
    tokenizer: str = Field(description="Folder with tokenizer.json, or a Hugging Face name.")
    demo: str | None = Field(None, description="Make the embedded demo corpus in this folder when it is missing.")
    row_tokens: int = Field(gt=8, description="Length of a packed row in tokens.")
    document_tokens: int | None = Field(
        None,
        gt=8,
        description="Longest document in tokens, and the length of a learned position table of the decoder; what is "
        "longer goes on in another sequence. None: row_tokens.",
    )
    row_images: int = Field(16, ge=1, description="Largest number of images in a row: bounds the encoder's memory.")
    image_first_probability: float = Field(0.5, ge=0, le=1, description="Share of pairs whose image precedes its text.")
    crop_scale: tuple[float, float] = Field((0.9, 1.0), description="Area range of the random crop; (1, 1): none.")
    max_image_pixels: int = Field(89_000_000, gt=0, description="Larger images are skipped before decoding.")
    max_text_bytes: int = Field(1 << 20, gt=0, description="Documents with more text, in bytes of UTF-8, are skipped.")
    stall_seconds: float = Field(60.0, gt=0, description="A sample that is read for longer is named in the log.")
    max_bad_share: float = Field(
        0.5, ge=0, lt=1, description="Largest share of bad ones among the last 1000 documents and images."
    )
    cache: str = Field("~/.cache/lcl_ds", description="Folder for pipe: streams and indices of remote shards.")
    workers: int = Field(0, ge=0, description="Loader processes per rank; 0 decodes in the training process.")
    lanes: int | None = Field(
        None,
        gt=0,
        description="Independent streams, best a multiple of ranks x workers. Fixed for a run. Default: 64, fewer for "
        "a small corpus, so that every sample comes about once an epoch.",
    )
    mix_by: Literal["samples", "images"] = Field("samples", description="What the sources' weights are shares of.")
    group_rows: int = Field(
        1,
        ge=1,
        description="Rows that go to one rank together, chosen so that every group has about as many images; "
        "must divide the rows of a rank's micro-step. 1: rows as they come.",
    )
    row_pool: int = Field(64, ge=1, description="Packed rows a lane chooses its groups from.")
    pack_window: int = Field(
        128,
        ge=1,
        description="Documents a lane looks at when it packs rows; at most a quarter of its epoch.",
    )
    block_samples: int = Field(
        16, ge=1, description="Neighbouring samples shuffled as one block; fewer in a small corpus."
    )
    shuffle_blocks: int = Field(4, ge=1, description="Blocks a lane mixes with each other.")

    @model_validator(mode="before")
    @classmethod
    def _plain_paths(cls, values: Any) -> Any:
        shards = values.get("shards") if isinstance(values, dict) else None
        if isinstance(shards, (str, dict)):
            shards = [shards]
        if isinstance(shards, list):
            sources = [
                {"name": f"source{i}" if len(shards) > 1 else "data", "paths": s} if isinstance(s, str) else s
                for i, s in enumerate(shards)
            ]
            values = {**values, "shards": sources}
        return values

    @model_validator(mode="after")
    def _check(self) -> "DataSettings":
        names = [source.name for source in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("shards: two sources have the same name")
        steps = {step for source in self.shards if isinstance(source.weight, dict) for step in source.weight}
        for step in sorted({0, *steps}):
            if not any(weight_at(source.weight, step) for source in self.shards):
                raise ValueError(f"shards: at step {step} all weights are 0")
        if self.row_pool < self.group_rows:
            raise ValueError("row_pool is smaller than group_rows")
        if self.document_tokens is not None and self.document_tokens > self.row_tokens:
            raise ValueError(f"document_tokens: {self.document_tokens} is more than row_tokens ({self.row_tokens})")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError("crop_scale: needs 0 < low <= high <= 1")
        return self

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document that a row can hold as one sequence."""
        return self.document_tokens or self.row_tokens


if TYPE_CHECKING:
    AnyObjective = ObjectiveSettings
else:
    AnyObjective = Annotated[Union[settings_classes()], Field(discriminator="name")]  # noqa: UP007


class TrainSettings(Settings):
    """Optimisation."""

    steps: int = Field(gt=0, description="Optimizer steps of the whole run.")
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
    weight_decay: float = Field(0.2, ge=0, description="Decay of matrices; none on norms, biases, positions, scale.")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW betas.")
    eps: float = Field(1e-6, gt=0, description="AdamW epsilon.")
    gradient_clipping: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 switches clipping off.")
    max_skipped_steps: int = Field(10, gt=0, description="Non-finite steps in a row after which the run stops.")

    @model_validator(mode="after")
    def _check(self) -> "TrainSettings":
        if self.global_batch_rows % self.accumulation_steps:
            raise ValueError("global_batch_rows must be a multiple of accumulation_steps")
        if any(not factor >= 0 for factor in self.learning_rate_factors.values()):
            raise ValueError("learning_rate_factors must not be negative")
        if len(self.learning_rate_factors) == 4 and not any(self.learning_rate_factors.values()):
            raise ValueError("learning_rate_factors are all 0: nothing would train")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate is larger than learning_rate")
        return self


class CheckpointSettings(Settings):
    """Saving."""

    every: int = Field(500, gt=0, description="Optimizer steps between checkpoints.")
    keep: int = Field(3, gt=0, description="Newest complete checkpoints to keep.")


class LogSettings(Settings):
    """What is shown; metrics.jsonl always has every step."""

    every: int = Field(10, gt=0, description="Steps between printed lines where there is no terminal.")


class EvaluationSettings(Settings):
    """The closing evaluation on held-out documents."""

    shards: str | list[str] | None = Field(None, description="Held-out document shards; none: no closing evaluation.")
    probe_labels: list[str] = Field(default_factory=list, description="Per-image labels that linear probes predict.")
    max_documents: int = Field(1000, gt=1, description="Documents used.")


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

    def seed(self, purpose: Literal["init", "data", "augmentation"]) -> int:
        """The seed of one purpose; ``train.seed`` where it has none of its own."""
        own = getattr(self.train, f"{purpose}_seed")
        return self.train.seed if own is None else own


def recipe_path(name_or_path: str) -> Path:
    """A recipe's file from its name (``demo``) or path.

    Raises:
        UserError: there is no such file.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise UserError(f"recipe {name_or_path}: there is no such file; shipped recipes: {known}")
    return path


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read and validate a recipe.

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
    given = {key: value for key, value in map(_parse_override, overrides or [])}
    for key, value in given.items():
        _set(tree, key.split("."), value, key)
    return validate_config(tree, str(path), given, READ_FOLDERS)


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
    key, found, value = text.partition("=")
    if not found or not key:
        raise UserError(f"{text!r}: an override is written key.sub=value")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{text!r}: the value is not valid YAML") from None


def _set(tree: dict[str, Any], keys: list[str], value: Any, whole: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"{whole}: {key} is a single value, it has no settings below it")
    tree[keys[-1]] = value


def _sentence(error: Any, origin: str, overrides: dict[str, Any]) -> str:
    keys = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "list[", "constrained-"))]
    branch = keys.pop(1) if keys[:1] == ["objective"] and len(keys) > 1 else ""  # pydantic names the union's member
    key = ".".join(keys)
    given = any(key == k or key.startswith(f"{k}.") or k.startswith(f"{key}.") for k in overrides)
    where = "command line" if given else origin
    match error["type"]:
        case "extra_forbidden":
            return f"{where}: {key}: unknown setting{suggest(keys[-1], _fields_at(keys[:-1], branch))}"
        case "missing":
            return f"{where}: {key}: missing"
        case "value_error":
            return f"{where}: {key}: {error['ctx']['error']}"
        case "union_tag_invalid":
            name = error["ctx"]["tag"]
            return f"{where}: {key}.name: there is no {name!r}{suggest(name, NAMES)}; there are {', '.join(NAMES)}"
        case _:
            return f"{where}: {key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _fields_at(keys: list[str], objective: str) -> list[str]:
    """Names of the settings below ``keys``; those of ``objective`` below that key."""
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
