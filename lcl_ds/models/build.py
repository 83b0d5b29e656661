"""Build a model from settings, with reproducible initial weights."""

from typing import Any

import torch
from accelerate import init_empty_weights

from lcl_ds.errors import UserError
from lcl_ds.grids import NativeResolution, kept_count
from lcl_ds.models.attention.masks import Mode, unavailable, unsupported
from lcl_ds.models.decoder import build_decoder_config, check_isolation, check_positions
from lcl_ds.models.initial import fill_weights
from lcl_ds.models.network import LCLModel
from lcl_ds.models.settings import ModelSettings
from lcl_ds.models.vision import build_vision_config, image_tokens


def vision_config(settings: ModelSettings) -> Any:
    """Make the transformers configuration of the vision tower in ``settings``.

    Raises:
        UserError: the family is not supported, or the image size is not a multiple of the patch size.
    """
    vision = settings.vision
    try:
        return build_vision_config(vision.model_type, vision.hf_keys, vision.image_mean, vision.image_std)
    except ValueError as error:
        raise UserError(f"model.{error}") from error


def tokens_per_image(settings: ModelSettings, training: bool = False) -> int:
    """Count the image tokens N of the vision tower in ``settings``; in training those that patch dropout keeps.

    Where images keep their aspect ratio, training has no more than so many of each.
    """
    native = native_resolution(settings) if training else None
    if native is not None:
        return native.most_tokens
    return kept_count(image_tokens(vision_config(settings)), settings.vision.patch_dropout if training else 0.0)


def native_resolution(settings: ModelSettings) -> NativeResolution | None:
    """Say how training chooses the grids of images; None where all are squares."""
    vision = settings.vision
    if vision.resolution == "square":
        return None
    config = vision_config(settings)
    most = vision.max_image_tokens or image_tokens(config)
    least = vision.min_image_tokens or most
    if least > most:
        raise UserError(
            f"model.vision.min_image_tokens: {least} is more than the {most} patches of image_size "
            f"{config.image_size}; set max_image_tokens as well"
        )
    return NativeResolution(config.patch_size, least, most, vision.patch_dropout)


def image_size(settings: ModelSettings) -> int:
    """Return the side of the vision tower's square images in pixels."""
    return vision_config(settings).image_size


def build_model(settings: ModelSettings, vocab_size: int, document_tokens: int, seed: int) -> LCLModel:
    """Build a network with first weights, fp32 on the CPU; see :func:`build_empty_model`."""
    model = build_empty_model(settings, vocab_size, document_tokens)
    fill_weights(model, seed)
    model.choose_attention()
    return model


def build_empty_model(settings: ModelSettings, vocab_size: int, document_tokens: int) -> LCLModel:
    """Build a network whose weights take no memory; :func:`lcl_ds.models.initial.fill_weights` gives them values.

    Args:
        document_tokens: length of the longest document; a learned position table has as many rows.

    Raises:
        UserError: the settings do not fit together; names the key.
    """
    try:
        decoder = build_decoder_config(
            settings.decoder.model_type, settings.decoder.hf_keys, vocab_size, document_tokens
        )
        mode: Mode = "images" if settings.decoder.bidirectional_images else "causal"
        check_isolation(decoder, settings.decoder.attention, mode)
        vision = vision_config(settings)
        with torch.random.fork_rng(devices=[]), init_empty_weights():
            model = LCLModel(
                vision,
                decoder,
                settings.pooling.num_attention_heads,
                settings.logit_scale_init,
                int(settings.vision.activation_checkpointing),
                int(settings.decoder.activation_checkpointing),
                settings.vision.attention,
                settings.decoder.attention,
                settings.decoder.bidirectional_images,
                patch_dropout=settings.vision.patch_dropout,
                is_native=settings.vision.resolution == "native",
            )
        check_positions(model.decoder, document_tokens)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    _check_attention(model)
    if model.vision.is_native and not model.vision.takes_masks:
        raise UserError(
            f"model.vision.resolution: native: the blocks of {settings.vision.model_type} cannot be told here "
            "which image a token is of, by this release of transformers; use another model_type, or square"
        )
    return model


def _check_attention(model: LCLModel) -> None:
    """Refuse an attention implementation that a tower cannot use. Raises: UserError, names the keys."""
    problems = []
    towers: list[tuple[str, Any, str, Mode]] = [
        ("vision", model.vision.model, model.vision.attention, "causal"),
        ("decoder", model.decoder, model.attention, model.attention_mode),
    ]
    for name, tower, wanted, mode in towers:
        if wanted == "auto":
            continue
        reason = unsupported(tower, wanted, mode)
        if reason:
            problems.append(f"model.{name}.attention: {wanted}: {reason}; use auto or eager")
    if problems:
        raise UserError(problems)


def check_attention_here(settings: ModelSettings, device_type: str, precision: str) -> None:
    """Refuse to train with an attention implementation that this machine lacks; what only reads a model takes another.

    Raises:
        UserError: names the key.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    wanted = {"vision": settings.vision.attention, "decoder": settings.decoder.attention}
    reasons = {name: unavailable(attention, device_type, dtype) for name, attention in wanted.items()}
    if problems := [f"model.{n}.attention: {wanted[n]}: {reason}; use auto" for n, reason in reasons.items() if reason]:
        raise UserError(problems)
