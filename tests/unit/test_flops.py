"""The count of operations behind ``mfu`` and the planner."""

from dataclasses import replace

import pytest
import torch
from lcl_kernels import contrastive_loss

from lcl_ds.assembly import attach_objective
from lcl_ds.flops import GridWork, StepFlops, StepWork, size_of, total
from lcl_ds.objectives.base import local_normalizers
from lcl_ds.training.optimizer import freeze_parts
from tests.support.counting import flop_counter
from tests.support.native import NATIVE, SQUARE, grids_of, native_documents
from tests.support.small import (
    VISION_TOWERS,
    small_config,
    small_model,
    three_documents,
)


def objective_of(*overrides, decoder="llama"):
    config = small_config(*overrides, decoder=decoder)
    objective = attach_objective(small_model(config), config)
    freeze_parts(objective, config.train)
    return objective.train(), config


def work_of(objective, batch):
    pairs = objective.count_terms(batch).get("pairs", 0)
    return StepWork(
        images=batch.image_count,
        tokens=batch.input_ids.numel(),
        squares=batch.token_squares,
        labels=len(batch.labels),
        pairs=pairs,
        pair_products=pairs**2,
        grids=GridWork.of(batch.grids) if batch.packed else None,
    )


def counted(objective, batch):
    with flop_counter() as counter:
        objective(batch, *local_normalizers(objective, batch))["loss"].backward()
    return counter.get_total_flops()


CHECKPOINTED = ("model.vision.activation_checkpointing=true", "model.decoder.activation_checkpointing=2")
CASES = {
    "clip, gpt2": ("gpt2", []),
    "siglip2, llama, everything recomputed or every second block": (
        "llama",
        [f"model.vision={VISION_TOWERS['siglip2_vision_model']}", *CHECKPOINTED],
    ),
    "dinov2, qwen3 with shared heads": (
        "qwen3",
        [f"model.vision={VISION_TOWERS['dinov2']}", "model.decoder.num_key_value_heads=1", *CHECKPOINTED],
    ),
    "a frozen encoder, opt": ("opt", ["train.learning_rate_factors={vision: 0}", *CHECKPOINTED]),
    "a frozen decoder, mistral": ("mistral", ["train.learning_rate_factors={decoder: 0}", *CHECKPOINTED]),
    "frozen but for the heads": ("llama", ["train.learning_rate_factors={vision: 0, pooling: 0, decoder: 0}"]),
    "half of the patches dropped": ("llama", ["model.vision.patch_dropout=0.5"]),
    "clip's objective, siglip": (
        "llama",
        ["objective.name=clip", f"model.vision={VISION_TOWERS['siglip_vision_model']}"],
    ),
    "coca": ("llama", ["objective.name=coca", "data.row_tokens=48"]),
    "generation, gemma3": ("gemma3_text", ["objective.name=generation", *CHECKPOINTED]),
    "regression": ("llama", ["objective.name=generation_regression"]),
    "captioning": ("llama", ["objective.name=captioning", "objective.kept_fraction=0.5"]),
    "one transformer": ("llama", ["objective.name=genlip", "model.vision.patch_dropout=0.5"]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_configuration_needs_what_torch_counts(name):
    decoder, overrides = CASES[name]
    objective, config = objective_of(*overrides, decoder=decoder)
    batch = three_documents(config)
    work = work_of(objective, batch)
    if objective.one_transformer:  # a mask hides pairs of tokens, whose products torch computes and counts
        work = replace(work, squares=len(batch.input_ids) * batch.input_ids.shape[1] ** 2)
    ours = total(StepFlops(objective).of(work)).computed
    assert ours == pytest.approx(counted(objective, batch), rel=0.01)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["lcl", "clip"])
def test_images_of_all_shapes_need_what_torch_counts(name, dropout):
    """But for the positions that are resized to them, which a small tower shows."""
    overrides = [f"objective.name={name}", *NATIVE, "model.vision.num_hidden_layers=6", *CHECKPOINTED]
    objective, config = objective_of(*overrides)
    batch = native_documents(config, dropout)
    work = work_of(objective, batch)
    assert (work.grids.patches, work.grids.tokens) == (15, 15 if dropout == 0 else 7)
    ours = total(StepFlops(objective).of(work)).computed
    assert ours == pytest.approx(counted(objective, batch), rel=0.01)


def test_squares_in_a_run_of_all_shapes_need_what_squares_need():
    flops = StepFlops(objective_of("model.vision.patch_dropout=0.5")[0])
    squares = StepWork(images=3, tokens=144, squares=2000, labels=30)
    grids = GridWork.of(grids_of([SQUARE] * 3, dropout=0.5))
    assert flops.of(squares) == flops.of(replace(squares, grids=grids))


def test_similarities_are_computed_twice():
    """They are too few in a small batch to be seen in a whole step."""
    pairs, width = 64, 32
    x, y = (torch.nn.functional.normalize(torch.randn(pairs, width), dim=1).requires_grad_() for _ in range(2))
    with flop_counter() as counter:
        contrastive_loss(x, y, torch.tensor(14.0)).backward()
    work = StepWork(images=0, tokens=0, squares=0, labels=0, pair_products=pairs**2)
    similarities = StepFlops(objective_of()[0]).of(work)["contrastive"]
    assert similarities.computed == counter.get_total_flops() == 8 * pairs**2 * width


def test_a_step_is_the_sum_of_what_it_reads():
    objective, config = objective_of()
    flops, work = StepFlops(objective), work_of(objective, three_documents(config))
    twice = work + work
    assert total(flops.of(twice)).model == pytest.approx(2 * total(flops.of(work)).model)
    assert work * 2 == twice


def test_utilisation_counts_nothing_twice():
    work = StepWork(images=3, tokens=144, squares=2000, labels=30, pairs=3, pair_products=9)
    plain, recomputing = (total(StepFlops(objective_of(*some)[0]).of(work)) for some in ((), CHECKPOINTED))
    assert recomputing.model == plain.model
    assert recomputing.computed > plain.computed > plain.model


def test_weights_that_are_partitioned_count_whole():
    objective, config = objective_of()
    work = work_of(objective, three_documents(config))
    whole = total(StepFlops(objective).of(work))
    sizes = size_of(objective.parameters())
    for weight in objective.parameters():  # as DeepSpeed leaves them at stage 3
        weight.ds_numel, weight.ds_shape = weight.numel(), weight.shape
        weight.data = torch.empty(0)
    assert total(StepFlops(objective).of(work)) == whole
    assert size_of(objective.parameters()) == sizes


def test_a_token_meets_the_experts_that_it_is_sent_to():
    mixture = "{model_type: mixtral, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
    heads = "num_attention_heads: 2, num_key_value_heads: 2, num_local_experts: 4}"
    objective, _ = objective_of(f"model.decoder={mixture}{heads}")
    experts = [m for m in objective.modules() if type(m).__name__.endswith("Experts")]
    everything = sum(w.numel() for module in experts for w in module.parameters())
    work = StepWork(images=0, tokens=10, squares=0, labels=0)
    decoder = StepFlops(objective).of(work)["decoder"].forward
    others = sum(m.weight.numel() for m in objective.model.decoder.modules() if isinstance(m, torch.nn.Linear))
    routers = [m.weight.numel() for m in objective.modules() if type(m).__name__.endswith("Router")]
    assert len(experts) == 2
    assert decoder == 2 * 10 * (others + everything / 2)
    assert sum(routers) < 0.01 * everything, "routers are left out"


if __name__ == "__main__":
    for name, (decoder, overrides) in CASES.items():
        objective, config = objective_of(*overrides, decoder=decoder)
        batch = three_documents(config)
        ours = total(StepFlops(objective).of(work_of(objective, batch)))
        theirs = counted(objective, batch)
        print(f"{name:62} {ours.computed / 1e6:9.4f} {theirs / 1e6:9.4f} {100 * (ours.computed / theirs - 1):+.2f} %")
