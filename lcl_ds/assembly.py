"""Put a run together from its settings: the one place where data, models and objectives meet."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from lcl_ds.config import Config
from lcl_ds.data.corpus import OpenData, open_data
from lcl_ds.data.exclusion import read_excluded
from lcl_ds.data.settings import DataSettings
from lcl_ds.data.shards.team import ALONE, Team
from lcl_ds.data.stream.lanes import LaneSettings
from lcl_ds.errors import UserError
from lcl_ds.grids import NativeResolution
from lcl_ds.models.build import build_empty_model, image_size, native_resolution, tokens_per_image
from lcl_ds.models.initial import GivenWeights
from lcl_ds.models.network import LCLModel
from lcl_ds.models.weights.transfer import Release, given_weights, open_release
from lcl_ds.objectives import build_empty_objective, build_objective, view_of
from lcl_ds.objectives.base import Objective, prepare_network
from lcl_ds.phases import check_image_sizes, with_image_size


def open_checked_data(config: Config, team: Team = ALONE) -> OpenData:
    """Open the run's data, after everything about it that can be wrong was looked at.

    Args:
        team: the processes that share the work.

    Raises:
        UserError: names the key and the file.
    """
    check_image_sizes(config)
    check_resolution(config)
    for size in (config.train.image_sizes or {}).values():
        _image_tokens_that_fit(with_image_size(config, size), training=True)
    data = open_data(config.data, team)
    check_vocabulary(config, data)
    return data


def check_resolution(config: Config) -> None:
    """Refuse settings of images of one shape beside those of images that keep theirs, and the other way round.

    Raises:
        UserError: names the key.
    """
    is_native = native_resolution(config.model) is not None
    if is_native and config.train.image_sizes is not None:
        raise UserError(
            "train.image_sizes: sizes of squares by step, but model.vision.resolution is native; leave one of them out"
        )
    if not is_native and config.data.row_image_tokens is not None:
        raise UserError(
            "data.row_image_tokens: all images have as many tokens, and data.row_images bounds them; set "
            "model.vision.resolution=native or leave row_image_tokens out"
        )


def check_vocabulary(config: Config, data: OpenData) -> None:
    """Refuse a decoder whose vocabulary is set and is not the tokenizer's plus the control tokens, or whose weights
    belong to another tokenizer.

    Raises:
        UserError: names both sizes, or where the tokenizers differ.
    """
    folder = config.model.decoder.pretrained
    if folder and (difference := data.tokenizer.difference_to(Path(folder) / "tokenizer.json")):
        raise UserError(
            f"data.tokenizer: {config.data.tokenizer} is not the tokenizer of model.decoder.pretrained: {difference}; "
            f"set data.tokenizer={folder}"
        )
    wanted = config.model.decoder.hf_keys.get("vocab_size")
    size = data.tokenizer.vocabulary.size
    if wanted is not None and wanted != size:
        raise UserError(
            f"model.decoder.vocab_size: {wanted} does not match data.tokenizer {config.data.tokenizer} with "
            f"{data.tokenizer.vocabulary.text_size} tokens plus {size - data.tokenizer.vocabulary.text_size} control "
            f"tokens = {size}; leave the key out to follow the tokenizer"
        )


def lane_settings(config: Config, *, training: bool = True) -> LaneSettings:
    """Say what rows are made of, for the objective and the vision tower of ``config``.

    Args:
        training: False for evaluation, which shows every patch of an image and a caption before its image.

    Raises:
        UserError: a row cannot hold one image, or a file of ``data.exclude`` cannot be read.
    """
    data = config.data
    image_tokens = _image_tokens_that_fit(config, training)
    same = {field.name for field in fields(LaneSettings)} & DataSettings.model_fields.keys()
    values: dict[str, Any] = {name: getattr(data, name) for name in same}
    values["lanes"] = data.lanes or 0
    # What is evaluated are squares of the size that the tower's positions have.
    values["native"] = native = native_resolution(config.model) if training else None
    values["row_image_tokens"] = None if native is None else _row_image_tokens(config, native)
    return LaneSettings(
        **values,
        data_seed=config.seed("data"),
        augmentation_seed=config.seed("augmentation"),
        image_tokens=image_tokens,
        image_size=image_size(config.model),
        rows_per_step=config.train.global_batch_rows,
        # An image that precedes its caption is announced by nothing.
        view=view_of(config.objective, data.image_first_probability if training else 0.0),
        excluded=read_excluded(data.exclude) if training else frozenset(),
    )


def slot_tokens(config: Config, *, training: bool = True) -> int:
    """Count the tokens of an image that the decoder sees; see :func:`lane_settings`."""
    encoded = tokens_per_image(config.model, training=training)
    return config.objective.tokens_in_slot(encoded) if training else encoded


def _row_image_tokens(config: Config, native: NativeResolution) -> int:
    """Return the budget of image tokens of a row. Raises: UserError when it cannot hold one image."""
    budget = config.data.row_image_tokens
    if budget is not None and budget < native.most_tokens:
        raise UserError(f"data.row_image_tokens: {budget} cannot hold one image of {native.most_tokens} tokens")
    return budget or config.data.row_images * native.most_tokens


def _image_tokens_that_fit(config: Config, training: bool) -> int:
    """Count the tokens of an image. Raises: UserError when a row cannot hold one."""
    data, image_tokens = config.data, slot_tokens(config, training=training)
    if image_tokens + 4 > data.longest_document:
        name = "row_tokens" if data.document_tokens is None else "document_tokens"
        raise UserError(f"data.{name}: {data.longest_document} cannot hold one image of {image_tokens} tokens plus 4")
    return image_tokens


def build_empty(config: Config, vocab_size: int) -> Objective:
    """Build network and objective of the run, of which nothing takes memory: names and shapes of their weights."""
    network = build_empty_model(config.model, vocab_size, config.data.longest_document)
    return _prepared(build_empty_objective(network, config.objective))


def weights_given(
    network: LCLModel, config: Config, data: OpenData, open_start: Callable[[Path], Release] = open_release
) -> tuple[GivenWeights, list[str]]:
    """Find the weights of the parts for which ``config`` names a folder, and say so in a sentence about each.

    Args:
        open_start: opens what ``model.init_from`` names.

    Raises:
        UserError: names every weight that does not fit.
    """
    text_size, seed = data.tokenizer.vocabulary.text_size, config.seed("init")
    return given_weights(network, config.model, text_size, seed, open_start)


def attach_objective(network: LCLModel, config: Config) -> Objective:
    """Wrap a network in the objective of the run, whose heads its seed draws, and prepare it for that."""
    return _prepared(build_objective(network, config.objective, config.seed("init")))


def _prepared(objective: Objective) -> Objective:
    prepare_network(objective)
    return objective
