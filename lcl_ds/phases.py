"""Train with images of one size for a while, then of another: a run with ``train.image_sizes`` is a chain of phases.

A phase ends with a checkpoint, and the next one starts from it with a network and a stream of rows of its own. A
checkpoint belongs to the phase of the last step that it has seen.
"""

from typing import Any

from lcl_ds.config import Config
from lcl_ds.errors import UserError
from lcl_ds.models.build import image_size, vision_config


def config_of_step(config: Config, step: int) -> Config:
    """Give the settings that the run's ``step``-th step is trained with, the first being 1."""
    sizes = config.train.image_sizes
    if sizes is None:
        return config
    return with_image_size(config, sizes[max(first for first in sizes if first < max(1, step))])


def last_step_of_phase(config: Config, step: int) -> int:
    """Say which step is the last one with images of the size that the ``step``-th has."""
    return min((first for first in config.train.image_sizes or {} if first >= step), default=config.train.steps)


def with_image_size(config: Config, size: int) -> Config:
    """Change the size of images and, with it, the number of the tower's positions, which are resized."""
    patch = vision_config(config.model).patch_size
    keys: dict[str, Any] = {"image_size": size, "interpolate_positions": True}
    if "num_patches" in config.model.vision.hf_keys:
        keys["num_patches"] = (size // patch) ** 2
    vision = config.model.vision.model_copy(update=keys)
    return config.model_copy(update={"model": config.model.model_copy(update={"vision": vision})})


def check_image_sizes(config: Config) -> None:
    """Refuse sizes of images that the tower cannot have, or that do not end with the size of the recipe's tower.

    Raises:
        UserError: names the size.
    """
    sizes = config.train.image_sizes
    if sizes is None:
        return
    last, full = sizes[max(sizes)], image_size(config.model)
    if last != full:
        raise UserError(
            f"train.image_sizes: the last size is {last}, model.vision.image_size is {full}; the last one is what is "
            "evaluated and released, so make them equal"
        )
    patch = vision_config(config.model).patch_size
    if wrong := [size for size in sizes.values() if size % patch]:
        raise UserError(f"train.image_sizes: {wrong[0]} is not a multiple of model.vision.patch_size {patch}")
