"""Muon's updates and the encoder's moving average are those of one process in float64, whatever ranks, ZeRO stages and
precisions a run goes through."""

import gzip
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lcl_ds.convert import main as convert
from lcl_ds.errors import UserError
from lcl_ds.metrics import read_metrics
from lcl_ds.training.checkpoint import EMA, MOMENTS, WEIGHTS, checkpoint_of, load_model, read_manifest, slices_of
from lcl_ds.training.profiling import StepPart
from tests.support.legs import corpus_settings, leg, run_legs

pytestmark = pytest.mark.timeout(600)

DECAY = 0.7
MOMENTUM, LEARNING_RATE, WEIGHT_DECAY = 0.5, 0.01, 0.1
SKIPPED, STEPS = 4, 9
WAYS = [
    (2, "3 offload", "fp32", 2),
    (2, "2", "bf16", 4),
    (2, "3 small groups", "fp32", 5),
    (2, "0", "fp32", 6),
    (1, "3", "bf16", 7),
    (1, "0", "bf16", 8),
    (1, "1", "fp32", 9),
]
"""Ranks, ZeRO settings, precision and the step to stop after. The average is switched on after the first leg."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, demo_folder) -> Path:
    """A run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("muon")
    shared = [
        *(*corpus_settings(demo_folder), f"train.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=99"),
        *("train.warmup_steps=0", "train.optimizer=muon", f"train.muon_momentum={MOMENTUM}"),
        *(f"train.learning_rate={LEARNING_RATE}", f"train.min_learning_rate={LEARNING_RATE}"),
        *(f"train.weight_decay={WEIGHT_DECAY}", "log.profile_steps=[5, 5]", "log.profile_ranks=all"),
    ]
    for ranks in (2, 1):
        legs: dict[str, dict[str, Any]] = {}
        for number, (_, zero, precision, stop) in [(n, way) for n, way in enumerate(WAYS) if way[0] == ranks]:
            decay = [f"train.ema_decay={DECAY}"] if number else []
            legs[str(number)] = leg("run", zero, [*shared, f"precision={precision}", *decay], stop) | {"skip": SKIPPED}
        if ranks == 1:
            still = ["train.learning_rate=1e-30", "train.min_learning_rate=0", f"model.init_from={folder}/runs/run"]
            started = [*shared, *still, "model.init_parts=[vision, pooling]", "model.init_ema=true"]
            legs["second"] = leg("second", "3", started, 1)
        run_legs(folder, ranks, legs)
    return folder / "runs" / "run"


def saved(run, step, folder, start="model.vision.") -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin so, in float64, by the rest of their names."""
    checkpoint = checkpoint_of(run, step)
    reader = slices_of(checkpoint, folder, read_manifest(checkpoint))
    names = [name for name in reader.shapes if name.startswith(start)]
    return {name.removeprefix("momentum."): reader.whole(name, reader.shapes[name]).double() for name in names}


def update_of(momentum: Tensor) -> Tensor:
    """What five steps of the iteration make of the singular values, scaled."""
    u, s, v = torch.linalg.svd(momentum, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * max(momentum.shape) ** 0.5 * u @ torch.diag(s) @ v


def test_every_applied_step_moves_each_matrix_by_its_orthogonal_momentum(run):
    """The gradient follows from the momentum before, as it was saved, and after."""
    names = saved(run, 1, MOMENTS, "momentum.").keys()
    assert len([name for name in names if ".layers." in name]) == 2 * (6 + 7)
    for step in range(2, STEPS + 1):
        before, after = (saved(run, n, WEIGHTS, "model.") for n in (step - 1, step))
        old, new = (saved(run, n, MOMENTS, "momentum.") for n in (step - 1, step))
        for name in names:
            if step == SKIPPED:
                assert torch.equal(before[name], after[name])
                assert torch.equal(old[name], new[name])
                continue
            gradient = (new[name] - MOMENTUM * old[name]) / (1 - MOMENTUM)
            update = update_of(MOMENTUM * new[name] + (1 - MOMENTUM) * gradient)
            expected = (1 - LEARNING_RATE * WEIGHT_DECAY) * before[name] - LEARNING_RATE * update
            error = float((after[name] - expected).norm() / (LEARNING_RATE * update).norm())
            assert error < 2e-3, (step, name, error)


def test_all_other_weights_have_the_moments_of_adamw(run):
    muon, adamw = (saved(run, STEPS, MOMENTS, kind).keys() for kind in ("momentum.", "exp_avg."))
    adamw = {name.removeprefix("exp_avg.") for name in adamw}
    assert not muon & adamw
    assert muon | adamw == saved(run, STEPS, WEIGHTS, "model.").keys()


def test_it_is_the_average_of_the_weights_after_every_applied_step_since_it_was_switched_on(run):
    average = saved(run, 2, WEIGHTS)
    assert [row["applied"] for row in read_metrics(run)] == [step != SKIPPED for step in range(1, STEPS + 1)]
    for step in range(3, STEPS + 1):
        weights, actual = saved(run, step, WEIGHTS), saved(run, step, EMA)
        if step != SKIPPED:
            average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in weights}
        assert actual.keys() == average.keys()
        for name, expected in average.items():
            torch.testing.assert_close(actual[name], expected, rtol=1e-6, atol=1e-8)
    assert max(float((average[name] - weights[name]).abs().max()) for name in weights) > 1e-3


def test_a_step_is_profiled_on_every_rank(run):
    for rank in range(2):
        trace = json.loads(gzip.decompress((run / "profile" / f"steps_5_to_5_rank_{rank}.json.gz").read_bytes()))
        names = {event["name"] for event in trace["traceEvents"]}
        assert {f"lcl_ds.{part}" for part in get_args(StepPart)} <= names


def test_a_second_run_starts_its_parts_from_the_newest_checkpoint_and_the_tower_from_its_average(run):
    averages, weights, untrained = saved(run, STEPS, EMA), saved(run, STEPS, WEIGHTS, ""), saved(run, 1, WEIGHTS, "")
    for name, actual in saved(run.with_name("second"), 1, WEIGHTS, "").items():
        if name.startswith("model.vision."):
            assert torch.equal(actual, averages[name])
        elif name.startswith("model.pooling."):
            assert torch.equal(actual, weights[name])
        elif actual.dim() == 2:
            assert float((actual - weights[name]).abs().max()) > float((actual - untrained[name]).abs().max()) > 0


def test_a_model_is_loaded_with_either_tower(run):
    checkpoint = checkpoint_of(run, STEPS)
    for ema, folder in ((False, WEIGHTS), (True, EMA)):
        weights = dict(load_model(checkpoint, ema=ema).named_parameters())
        for name, expected in saved(run, STEPS, folder).items():
            assert torch.equal(weights[name.removeprefix("model.")].double(), expected)
        assert torch.equal(weights["lm_head.weight"], dict(load_model(checkpoint).named_parameters())["lm_head.weight"])


def test_either_tower_is_released_and_the_card_says_which(run, tmp_path):
    for option, folder in ([], WEIGHTS), (["--ema"], EMA):
        out = tmp_path / folder
        assert convert([str(run), str(out), *option]) == 0
        released = dict(load_file(out / "model.safetensors"))
        expected = saved(run, STEPS, folder)["model.vision.model.post_layernorm.weight"]
        assert torch.equal(released["vision_model.post_layernorm.weight"].double(), expected)
        assert (f"moving average of its weights (decay {DECAY})" in (out / "README.md").read_text()) == bool(option)


def test_a_checkpoint_without_an_average_says_so(run):
    with pytest.raises(UserError, match="has no moving average of the encoder; train.ema_decay was not set"):
        load_model(checkpoint_of(run, 2), ema=True)
