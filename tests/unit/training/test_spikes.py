"""What is a spike, and what is not."""

import itertools
import json
import math
import random

import pytest

from lcl_ds.training.spikes import ENOUGH, REMEMBERED, find_spike, loss_limit, norm_limit, remember


def judged(steps, factor=10.0):
    """Names of the numbers that are a spike, by step, where every step is remembered."""
    recent, spikes = {}, {}
    for number, (loss, norm) in enumerate(steps):
        if spike := find_spike(recent, factor, loss, norm):
            spikes[number] = spike.name
        remember(recent, loss, norm)
    return spikes


def healthy(steps, seed=0):
    """Losses and norms as small runs have them: a plateau, a fall, noise of a tenth and of a factor of 2."""
    rng = random.Random(seed)
    for step in range(steps):
        loss = 6.5 if step < 50 else 2 + 4.5 * math.exp(-(step - 50) / 80)
        yield loss * (1 + 0.03 * rng.gauss(0, 1)), 2 * math.exp(-step / 200) * math.exp(0.4 * rng.gauss(0, 1))


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_none(seed):
    assert judged(healthy(600, seed)) == {}


@pytest.mark.parametrize("at", [ENOUGH, 60, 400])
def test_a_gradient_norm_far_above_the_usual_one_is_a_spike(at):
    steps = list(healthy(500))
    steps[at] = steps[at][0], 60.0
    assert judged(steps) == {at: "grad_norm"}


def test_a_loss_that_jumps_is_a_spike_where_the_norm_is_as_usual():
    steps = list(healthy(500))
    steps[300] = 9.0, steps[300][1]
    assert judged(steps) == {300: "loss"}


def test_of_the_first_steps_only_a_loss_of_many_times_the_first_one_is_a_spike():
    assert judged([(1.0, 1.0)] * (ENOUGH - 1) + [(9.0, 1e6)]) == {}
    assert judged([(6.4, 3.0), (1e6, 1e13)]) == {1: "loss"}
    assert (norm_limit({}, 10), loss_limit({}, 10)) == (math.inf, math.inf)


def test_a_loss_that_hardly_varies_may_rise_by_a_tenth():
    assert judged([(6.9, 1.0)] * 100 + [(7.5, 1.0)]) == {}
    assert judged([(6.9, 1.0)] * 100 + [(7.7, 1.0)]) == {100: "loss"}


def test_where_no_norm_is_known_none_is_a_spike():
    assert judged([(1.0, 0.0)] * 50 + [(1.0, 5.0)]) == {}


def test_after_a_lasting_change_the_new_values_become_the_usual_ones():
    steps = [(1.0, 1.0)] * REMEMBERED + [(1.0, 50.0)] * REMEMBERED
    assert set(judged(steps)) == set(range(REMEMBERED, REMEMBERED + REMEMBERED // 2))


def test_what_is_remembered_is_json_of_bounded_size_and_has_no_infinities():
    recent = {}
    for loss, norm in itertools.chain(healthy(300), [(math.inf, math.nan)]):
        remember(recent, loss, norm)
    assert {name: len(values) for name, values in recent.items()} == {"loss": REMEMBERED, "grad_norm": REMEMBERED}
    assert json.loads(json.dumps(recent, allow_nan=False)) == recent
