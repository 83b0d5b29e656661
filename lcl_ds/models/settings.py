"""Declare the settings of the network: the ``model`` part of a recipe."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationInfo, model_validator
from transformers import CONFIG_MAPPING

from lcl_ds.models.encoders import IMAGE_MEAN, IMAGE_STD
from lcl_ds.models.vision import SHAPES
from lcl_ds.models.weights.hf_folder import with_architecture
from lcl_ds.settings import Settings, suggest

Part = Literal["vision", "pooling", "decoder", "heads"]
"""Parts of the network; heads are those of the decoder and the temperature."""
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "varlen", "flex_attention"]
READ_FOLDERS = object()
"""Validation context in which the folders of pretrained towers are looked into."""


def part_of(name: str) -> Part:
    """Say which part of :class:`lcl_ds.models.network.LCLModel` a weight belongs to; an objective's own are heads."""
    top = name.removeprefix("model.").split(".")[0]
    return top if top in ("vision", "pooling", "decoder") else "heads"  # type: ignore[return-value]


class TowerSettings(Settings):
    """A transformers model by configuration: ``model_type`` plus that family's own configuration keys."""

    model_config = ConfigDict(extra="allow", frozen=True)
    tower: ClassVar[Literal["vision", "decoder"]]

    model_type: str = Field(description="transformers model type: clip_vision_model, llama, gpt2, qwen3, ...")
    activation_checkpointing: bool | Annotated[int, Field(ge=1)] = Field(
        False, description="Blocks whose activations are recomputed in backward: none, all (true), or every k-th (k)."
    )
    attention: Attention = Field(
        "auto",
        description="Attention implementation of transformers. auto: sdpa; in a decoder variable-length attention "
        "where the family allows: on a GPU that of the flash-attn package where it is installed, else torch's own.",
    )
    pretrained: str | None = Field(
        None,
        description="Local Hugging Face folder (config.json, *.safetensors) to start from. It gives the architecture; "
        "keys here may repeat it but not contradict it.",
    )

    @property
    def hf_keys(self) -> dict[str, Any]:
        """Return the keys that belong to the transformers configuration."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, values: Any, info: ValidationInfo) -> Any:
        """Read the folder where a recipe is read: settings saved with a checkpoint have its architecture already."""
        if info.context is not READ_FOLDERS or not isinstance(values, dict) or not values.get("pretrained"):
            return values
        return with_architecture(values, cls.tower)

    @model_validator(mode="after")
    def _known_to_transformers(self) -> "TowerSettings":
        if self.model_type not in CONFIG_MAPPING:
            hint = suggest(self.model_type, CONFIG_MAPPING)
            raise ValueError(f"model_type: transformers has no {self.model_type!r}{hint}")
        defaults = CONFIG_MAPPING[self.model_type]()
        known = {*defaults.to_dict(), *defaults.attribute_map, *(["image_size"] if self.tower == "vision" else [])}
        unknown = [key for key in self.hf_keys if key not in known]
        if unknown:
            hints = ", ".join(f"{key!r}{suggest(key, known)}" for key in unknown)
            raise ValueError(f"{hints}: no such key in the {self.model_type} configuration")
        return self


class VisionSettings(TowerSettings):
    """The vision encoder."""

    tower = "vision"

    shape: str | None = Field(
        None, description="Named size (vit_b32, vit_b16, vit_l14, vit_h14, vit_g14, ...); keys given here override it."
    )
    image_mean: tuple[float, float, float] = Field(
        IMAGE_MEAN, description="Per channel, of pixels in 0 to 1; a folder brings its own."
    )
    image_std: tuple[float, float, float] = Field(
        IMAGE_STD, description="Standard deviation per channel, of the same pixels."
    )
    resolution: Literal["square", "native"] = Field(
        "square",
        description="Images in training: cut to a square of image_size, or whole in their own aspect ratio, with at "
        "most max_image_tokens patches; positions are then resized for each image.",
    )
    max_image_tokens: int | None = Field(
        None, ge=1, description="Patches of an image at most (native). None: as many as the square of image_size has."
    )
    min_image_tokens: int | None = Field(
        None,
        ge=1,
        description="Patches that a smaller image is enlarged to (native); up to max_image_tokens an image keeps its "
        "own size. None: max_image_tokens, so that all images have about as many.",
    )
    patch_dropout: float = Field(0.0, ge=0, lt=1, description="Fraction of an image's patches left out in training.")
    interpolate_positions: bool = Field(
        False,
        description="Whether pretrained position embeddings may be resized to the patches of image_size.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_shape(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("shape") is None:
            return values
        if values["shape"] not in SHAPES:
            hint = suggest(str(values["shape"]), SHAPES)
            raise ValueError(f"shape: there is no {values['shape']!r}{hint}; known: {', '.join(SHAPES)}")
        if values.get("pretrained"):
            raise ValueError("shape: the folder in pretrained gives the architecture; leave shape out")
        return {"model_type": "clip_vision_model", **SHAPES[values["shape"]], **values}

    @model_validator(mode="after")
    def _fits_resolution(self) -> "VisionSettings":
        bounds = {"max_image_tokens": self.max_image_tokens, "min_image_tokens": self.min_image_tokens}
        if given := [name for name, value in bounds.items() if value is not None and self.resolution == "square"]:
            raise ValueError(f"{given[0]}: all images are squares; set resolution=native or leave {given[0]} out")
        if self.min_image_tokens and self.max_image_tokens and self.min_image_tokens > self.max_image_tokens:
            raise ValueError(f"min_image_tokens: {self.min_image_tokens} is more than max_image_tokens")
        if self.resolution == "native" and self.attention not in ("auto", "varlen", "sdpa", "eager"):
            raise ValueError(f"attention: {self.attention} does not read packed images (resolution=native); use auto")
        return self


class DecoderSettings(TowerSettings):
    """The causal decoder."""

    tower = "decoder"

    bidirectional_images: bool = Field(
        False, description="Tokens of an image see each other, not only those before them (published: no)."
    )


class PoolingSettings(Settings):
    """The attentive pooling and projection head (published ``attentive.py``)."""

    num_attention_heads: int = Field(
        8, ge=1, description="Heads of the learned query; must divide the decoder's width."
    )


class ModelSettings(Settings):
    """The network."""

    vision: VisionSettings = Field(description="Vision encoder; what is released.")
    decoder: DecoderSettings = Field(description="Causal decoder; thrown away after training.")
    pooling: PoolingSettings = Field(default_factory=PoolingSettings)
    logit_scale_init: float = Field(1 / 0.07, gt=1, description="First temperature multiplier of the contrastive loss.")
    logit_scale_max: float = Field(100.0, gt=1, description="Upper bound of the multiplier after each applied step.")
    init_from: str | None = Field(
        None,
        description="What parts start from: a run folder (its newest checkpoint), one of its checkpoints, or a folder "
        "that `python -m lcl_ds.convert --part full` wrote.",
    )
    init_ema: bool = Field(
        False, description="Take the vision tower of init_from, a run, from its moving average (train.ema_decay there)."
    )
    init_parts: list[Part] = Field(
        ["vision", "pooling", "decoder", "heads"], description="Parts that init_from gives the weights of."
    )
    allow_missing: list[str] = Field(
        default_factory=list, description="Patterns (* and ?) of weights that may be missing and so stay random."
    )
    allow_unexpected: list[str] = Field(
        default_factory=list, description="Patterns (* and ?) of weights that a folder may hold beyond the model's."
    )

    @model_validator(mode="after")
    def _one_source_per_part(self) -> "ModelSettings":
        if self.init_ema and not (self.init_from and "vision" in self.init_parts):
            raise ValueError("init_ema: nothing starts from a moving average; init_from is to name a run, for vision")
        taken = {"vision"} if self.vision.pretrained else set()
        taken |= {"decoder", "heads"} if self.decoder.pretrained else set()
        if twice := sorted(taken & set(self.init_parts if self.init_from else [])):
            raise ValueError(f"init_parts: {', '.join(twice)} would come from init_from and from a pretrained folder")
        return self
