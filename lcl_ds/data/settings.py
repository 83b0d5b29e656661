"""Settings of the data: the ``data`` part of a recipe."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lcl_ds.settings import Settings

Weight = float | Mapping[int, float]
"""Either constant, or by the step from which it holds."""


def weight_at(weight: Weight, step: int) -> float:
    """Return the weight that holds at ``step``."""
    if not isinstance(weight, Mapping):
        return float(weight)
    return float(weight[max(first for first in weight if first <= step)])


class SourceSettings(Settings):
    """One source of documents or caption pairs."""

    name: str = Field(min_length=1, pattern=r"^[^/]*$", description="Name in logs and in resume fingerprints.")
    paths: str | list[str] = Field(
        description="WebDataset tars: path, glob, braces {0000..0099}, URL, pipe:COMMAND, .txt list of them, or a list."
    )
    weight: float | dict[int, float] = Field(
        1.0,
        description="Weight of its draws relative to the other sources; {0: 1, 5000: 0.5}: by step (a curriculum); "
        "documents that already wait for a row come a few steps late.",
    )

    @field_validator("weight")
    @classmethod
    def _from_the_start(cls, weight: float | dict[int, float]) -> float | dict[int, float]:
        weights = weight if isinstance(weight, dict) else {0: weight}
        if min(weights, default=-1) != 0:
            raise ValueError("by step it must name steps from 0 on")
        if not all(0 <= w < float("inf") for w in weights.values()) or not any(weights.values()):
            raise ValueError("must not be negative, and not 0 at every step")
        return weight


class TexturedSettings(Settings):
    """The harder embedded corpus, of which a run reads one set of shards in training."""

    folder: str = Field(description="Where it is made when it is missing, or is of other settings.")
    seed: int = Field(0, ge=0, description="Of its content.")
    documents: int = Field(22_000, ge=1, description="Training documents, of three images on average.")
    heldout_documents: int = Field(2_000, ge=1, description="Documents with labels, to evaluate on.")
    image_size: int = Field(48, ge=16, description="Side of the pictures in pixels.")
    silent: float = Field(0.1, ge=0, le=1, description="Fraction of images whose context says nothing of them.")
    bare: float = Field(0.2, ge=0, le=1, description="Fraction of documents that begin with an image, before any text.")
    mismatch: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of images that are described as another picture, in training: 0.2 makes "
        "mismatch20-documents-*.tar.",
    )
    pairs: bool = Field(
        False, description="Make pairs-*.tar: each image of the documents with its sentence, as caption pairs."
    )


class DataSettings(Settings):
    """Where documents come from and how they become rows."""

    shards: list[SourceSettings] = Field(description="Sources. A plain path or list of paths means weight 1 each.")
    tokenizer: str = Field(description="Folder with tokenizer.json, or a Hugging Face name.")
    demo: str | None = Field(None, description="Make the embedded demo corpus in this folder when it is missing.")
    textured: TexturedSettings | None = Field(
        None, description="Make the harder embedded corpus, or the sets of it that are missing."
    )
    row_tokens: int = Field(gt=8, description="Length of a packed row in tokens.")
    document_tokens: int | None = Field(
        None,
        gt=8,
        description="Longest document in tokens, and the length of a learned position table of the decoder; what is "
        "longer goes on in another sequence. None: row_tokens.",
    )
    row_images: int = Field(16, ge=1, description="Largest number of images in a row: bounds the encoder's memory.")
    row_image_tokens: int | None = Field(
        None,
        ge=1,
        description="The same bound where images keep their aspect ratio (model.vision.resolution): largest number of "
        "image tokens in a row. None: row_images images of the largest size.",
    )
    image_first_probability: float = Field(
        0.5, ge=0, le=1, description="Fraction of caption pairs whose image precedes its text."
    )
    crop_scale: tuple[float, float] = Field((0.9, 1.0), description="Area range of the random crop; (1, 1): none.")
    max_image_pixels: int = Field(89_000_000, gt=0, description="Larger images are skipped before decoding.")
    max_text_bytes: int = Field(1 << 20, gt=0, description="Documents with more text, in bytes of UTF-8, are skipped.")
    stall_seconds: float = Field(60.0, gt=0, description="A sample that is read for longer is named in the log.")
    max_bad_share: float = Field(
        0.5, ge=0, lt=1, description="Largest fraction of bad ones among the last 1000 documents and images."
    )
    exclude: list[str] = Field(
        default_factory=list,
        description="Files that name documents to leave out: skipped_steps.jsonl of a run, or one source/shard/key a "
        "line. May change on resume.",
    )
    cache: str = Field("~/.cache/lcl_ds", description="Folder for pipe: streams and indices of remote shards.")
    workers: int = Field(0, ge=0, description="Loader processes per rank; 0 decodes in the training process.")
    lanes: int | None = Field(
        None,
        gt=0,
        description="Independent streams, best a multiple of ranks x workers. Fixed for a run. Default: 64, fewer for "
        "a small corpus, so that every sample is drawn about once an epoch.",
    )
    mix_by: Literal["samples", "images"] = Field("samples", description="What the sources' weights are fractions of.")
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
            names = ["data"] if len(shards) == 1 else [f"source{i}" for i in range(len(shards))]
            sources = [
                {"name": name, "paths": entry} if isinstance(entry, str) else entry
                for name, entry in zip(names, shards, strict=True)
            ]
            values = {**values, "shards": sources}
        return values

    @field_validator("exclude", mode="before")
    @classmethod
    def _one_file_or_several(cls, exclude: Any) -> Any:
        return [exclude] if isinstance(exclude, str) else exclude

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
        """Return the length in tokens of the longest document that a row can hold as one sequence."""
        return self.document_tokens or self.row_tokens


def default_of(name: str) -> Any:
    """Return the default of a setting of the data, for what is made without a recipe."""
    return DataSettings.model_fields[name].default
