"""First weights are made unit by unit, and each depends on the seed and its own name alone."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModel

from lcl_ds.errors import UserError
from lcl_ds.models.build import build_empty_model, build_model
from lcl_ds.models.initial import _NamedDraws, fill_weights, seed_of, units
from lcl_ds.objectives import build_empty_objective
from tests.support.small import DECODERS, ROW_TOKENS, VISION_TOWERS, VOCABULARY, small_config, small_model


def empty_model(*overrides, **options):
    return build_empty_model(small_config(*overrides, **options).model, VOCABULARY.size, ROW_TOKENS)


def as_transformers_draws_it(config, prefix):
    """A whole tower with weights by transformers' own initialisation, each drawn from the generator of its name."""
    tower = AutoModel.from_config(config)
    for module in tower.modules():
        module._is_hf_initialized = False
    names = {f"{prefix}.{name}": weight for name, weight in tower.named_parameters()}
    with _NamedDraws(names, names, seed=0):
        tower.initialize_weights()
    return tower


@pytest.mark.parametrize("family", VISION_TOWERS)
def test_a_vision_tower_is_what_transformers_makes_of_it_as_a_whole(family):
    tower = small_model(small_config(f"model.vision={VISION_TOWERS[family]}")).vision.model
    whole = as_transformers_draws_it(tower.config, "vision.model")
    assert all(torch.equal(weight, whole.get_parameter(name)) for name, weight in tower.named_parameters())


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_is_what_transformers_makes_of_it_as_a_whole(family):
    decoder = small_model(small_config(decoder=family)).decoder
    whole = as_transformers_draws_it(decoder.config, "decoder")
    assert all(torch.equal(weight, whole.get_parameter(name)) for name, weight in decoder.named_parameters())


def test_our_own_weights_start_from_what_the_published_code_starts_from():
    config = small_config("model.decoder.hidden_size=256")
    model = build_model(config.model, 1000, ROW_TOKENS, seed=0)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.context_head.proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert model.logit_scale.log_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.pooling.query.std().item() == pytest.approx(1, rel=0.4)  # 32 numbers
    limit = 32**-0.5  # of torch's own Linear, uniform
    assert model.pooling.v.weight.abs().max().item() == pytest.approx(limit, rel=0.01)
    assert model.pooling.v.bias.std().item() == pytest.approx(limit / 3**0.5, rel=0.15)
    for norm in (model.lm_head.norm, model.context_head.norm, model.pooling.norm_q):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_a_weight_depends_on_the_seed_and_its_name_and_on_nothing_else():
    model = small_model()
    others = small_model(small_config("model.pooling.num_attention_heads=4", decoder="gpt2"))
    alone = empty_model()
    fill_weights(alone, 0, within=["vision"])
    for name, weight in model.vision.named_parameters():
        assert torch.equal(weight, others.vision.get_parameter(name)), name
        assert torch.equal(weight, alone.vision.get_parameter(name)), name
    assert all(weight.is_meta for weight in alone.decoder.parameters())
    queries = [layer.self_attn.q_proj.weight for layer in model.vision.model.encoder.layers]
    assert not torch.equal(*queries)
    again = build_model(small_config().model, VOCABULARY.size, ROW_TOKENS, seed=1)
    assert not torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert len({seed_of(s, name, offset) for s in (0, 1) for name in ("a", "b") for offset in (0, 8)}) == 8


def test_nothing_outside_is_drawn_from_the_generators_of_weights():
    before = torch.get_rng_state()
    small_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_one_unit_has_memory_at_a_time_and_every_weight_is_in_one():
    config = small_config("objective.name=masked")
    objective = build_empty_objective(empty_model("objective.name=masked"), config.objective)
    sizes = []

    def finish(unit):
        real = [weight for weight in objective.parameters() if not weight.is_meta]
        assert {*real} == {*unit.parameters()}
        sizes.append(sum(weight.numel() for weight in real))
        unit.to("meta")

    fill_weights(objective, 0, finish=finish)
    assert sum(sizes) == sum(weight.numel() for weight in objective.parameters())
    assert len(sizes) == len(list(units(objective))) > 10


def test_a_given_weight_is_read_and_the_others_are_drawn_as_without_it():
    model, given = empty_model(), {"vision.model.encoder.layers.1.mlp.fc1.bias": lambda: torch.arange(64.0)}
    fill_weights(model, 0, given)
    for name, weight in small_model().named_parameters():
        expected = given[name]() if name in given else weight
        assert torch.equal(model.get_parameter(name), expected), name


def test_a_weight_that_cannot_be_read_is_said_when_all_units_are_done():
    def broken():
        raise UserError("x.safetensors: cannot be read")

    finished = []
    with pytest.raises(UserError, match="x.safetensors: cannot be read"):
        fill_weights(empty_model(), 0, {"vision.model.post_layernorm.weight": broken}, finished.append)
    assert len(finished) == len(list(units(empty_model())))


def test_a_weight_that_no_rule_gives_a_value_is_named():
    model = empty_model()
    model.decoder.layers[1].mlp.gate = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(UserError, match=r"decoder.layers.1.mlp.gate: the family's own rule does not say"):
        fill_weights(model, 0)
