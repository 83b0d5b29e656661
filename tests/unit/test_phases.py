"""Images of a size that holds for some steps: which steps these are, and what is refused."""

import pytest

from lcl_ds.assembly import open_checked_data
from lcl_ds.errors import UserError
from lcl_ds.models.build import image_size, tokens_per_image
from lcl_ds.phases import check_image_sizes, config_of_step, last_step_of_phase
from lcl_ds.training.loop import is_saved
from tests.support.small import VISION_TOWERS, small_config

STEPS = "train.steps=10"


@pytest.mark.parametrize("tower", VISION_TOWERS)
def test_a_size_holds_from_its_step_to_the_next_one_s(tower):
    config = small_config(f"model.vision={VISION_TOWERS[tower]}", STEPS, "train.image_sizes={0: 8, 4: 24, 7: 16}")
    check_image_sizes(config)
    sizes = [image_size(config_of_step(config, step).model) for step in range(1, 11)]
    assert sizes == [8] * 4 + [24] * 3 + [16] * 3
    assert tokens_per_image(config_of_step(config, 5).model) == 9
    assert [last_step_of_phase(config, step) for step in (1, 4, 5, 7, 8, 10)] == [4, 4, 7, 7, 10, 10]
    assert [step for step in range(1, 11) if is_saved(step, config)] == [4, 7, 10]


def test_one_size_is_the_recipe_s_and_one_phase():
    config = small_config(STEPS)
    assert config_of_step(config, 3) is config
    assert last_step_of_phase(config, 3) == 10


@pytest.mark.parametrize("sizes", ["{}", "{1: 16}", "{0: 8, 10: 16}", "{0: 0, 5: 16}"])
def test_sizes_that_leave_a_step_without_one_are_refused(sizes):
    with pytest.raises(UserError, match=r"train: image_sizes: sizes by step, of which the first step is 0"):
        small_config(STEPS, f"train.image_sizes={sizes}")


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ("{0: 8, 5: 24}", "train.image_sizes: the last size is 24, model.vision.image_size is 16"),
        ("{0: 12, 5: 16}", "train.image_sizes: 12 is not a multiple of model.vision.patch_size 8"),
    ],
)
def test_sizes_that_do_not_fit_the_tower_are_refused(sizes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_image_sizes(small_config(STEPS, f"train.image_sizes={sizes}"))


def test_every_size_is_looked_at_before_the_first_step():
    config = small_config("train.image_sizes={0: 16, 1: 64, 2: 16}", "train.steps=3")
    with pytest.raises(UserError, match="cannot hold one image of 64 tokens"):
        open_checked_data(config)
