"""What a plan says, against the model that is built, tensors that are counted, and a run on a GPU that was recorded."""

import json
from dataclasses import replace

import pytest

from lcl_ds.assembly import build_empty
from lcl_ds.config import RECIPES, ds_config_path, load_config, recipe_path
from lcl_ds.errors import UserError
from lcl_ds.gpus import GPUS, Gpu, gpu_of
from lcl_ds.objectives import NAMES
from lcl_ds.objectives.base import local_normalizers
from lcl_ds.plan.communication import Network
from lcl_ds.plan.contents import RowContents, contents_of, made_up_row, vocabulary_of
from lcl_ds.plan.memory import Layout
from lcl_ds.plan.planner import Choice, Planner
from lcl_ds.plan.search import rows_of, search, settings_of, what_would_fit
from lcl_ds.plan.timing import Cost
from lcl_ds.plan.trace import LiveBytes, Tracer, shallow_config
from lcl_ds.training.engine import load_ds_config, zero_settings
from tests.support.ranks import ROOT
from tests.support.small import VOCABULARY, batch_with_images, lcl_objective, small_config, small_model

RECORDED = json.loads((ROOT / "bench_results" / "gpu_training_h100.json").read_text())["training"]


def planner_of(config, gpu="h100", gpus=8, hosts=1, stage="zero3", contents=None, text_tokens=6, **options):
    vocabulary, _ = vocabulary_of(config, 60 if config.name == "demo" else None)
    row = made_up_row(config, vocabulary, text_tokens)
    gpu = gpu if isinstance(gpu, Gpu) else GPUS[gpu]
    ds_config = load_ds_config(ds_config_path(stage))
    contents = contents or contents_of(row, config, text_tokens)
    return Planner(config, ds_config, vocabulary.size, row, contents, gpu, gpus, hosts, **options)


@pytest.fixture(scope="module")
def recorded():
    """The plan of the run on one H100 that bench_results has, with its own rows."""
    rows = 8
    contents = RowContents(
        tokens=2048,
        images=RECORDED["images_per_step"] / rows,
        labels=RECORDED["text_tokens_per_step"] / rows,
        pairs=RECORDED["images_per_step"] / rows,
        squares=1e6,
        known_from="bench_results",
    )
    planner = planner_of(load_config(recipe_path("gpu_check")), gpus=1, contents=contents, price=2.0)
    return planner, planner.plan(planner.given())


def test_memory_is_what_was_recorded_on_an_h100(recorded):
    _, plan = recorded
    assert plan.memory.allocated / 2**30 == pytest.approx(RECORDED["memory_gb"], rel=0.1)
    assert plan.memory.needed > plan.memory.allocated


def test_at_the_recorded_speed_utilisation_is_the_recorded_one(recorded):
    """It was counted without attention then, which adds some percent."""
    planner, plan = recorded
    operations = sum(part.model for part in plan.flops.values())
    mfu = operations / (RECORDED["median_step_s"] * planner.gpu.peak_tflops * 1e12)
    assert RECORDED["median_mfu"] < mfu < 1.3 * RECORDED["median_mfu"]


def test_cost_is_that_of_all_steps(recorded):
    planner, plan = recorded
    hours = plan.time.total * planner.config.train.steps / 3600
    assert plan.cost.gpu_hours == pytest.approx(hours)
    assert plan.cost.dollars == pytest.approx(2 * hours)
    assert Cost.of(3600, 48, 8, None) == Cost(2.0, 384.0, None)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_parameters_are_those_of_the_model_that_is_built(recipe):
    config = load_config(recipe_path(recipe))
    planner = planner_of(config, contents=RowContents(256, 4, 100, 4, 1e4, ""))
    built = sum(weight.numel() for weight in build_empty(config, planner.vocab_size).parameters())
    assert planner.sizes.all == built
    assert planner.sizes.trained + planner.sizes.frozen == built
    assert planner.sizes.largest_group < planner.sizes.trained


@pytest.mark.parametrize("every", [0, 1])
def test_traced_activations_are_those_that_a_step_keeps(every):
    config = small_config(
        f"model.vision.activation_checkpointing={bool(every)}".lower(),
        f"model.decoder.activation_checkpointing={bool(every)}".lower(),
    )
    config = shallow_config(config, {"vision": 3, "decoder": 3}, {"vision": every, "decoder": every})
    batch = batch_with_images()
    rows = len(batch.input_ids)
    objective = lcl_objective(small_model(config)).train()
    with LiveBytes() as counted:
        outputs = objective(batch, *local_normalizers(objective, batch))
        kept = counted.live
    assert outputs["loss"] > 0
    contents = RowContents(48, batch.image_count / rows, len(batch.labels) / rows, 2, 1e3, "")
    tracer = Tracer(config, VOCABULARY.size, batch, contents, "varlen")
    assert tracer.activations(rows, every, every).kept == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_can_be_planned(name):
    planner = planner_of(small_config(f"objective.name={name}", "data.row_tokens=64"))
    plan = planner.plan(planner.given())
    assert plan.memory.needed > 0
    assert plan.time.total > 0
    assert 0 < plan.mfu < 1


@pytest.mark.parametrize("decoder", ["gemma2", "qwen3", "opt", "gpt2"])
def test_other_decoders_can_be_planned(decoder):
    planner = planner_of(small_config(decoder=decoder))
    assert planner.plan(planner.given()).memory.needed > 0


def test_images_that_see_all_of_themselves_can_be_planned():
    planner = planner_of(small_config("model.decoder.bidirectional_images=true"))
    assert planner.attention == "flex_attention"
    assert planner.plan(planner.given()).memory.needed > 0


def test_a_decoder_that_has_to_be_tried_out_is_refused():
    mixture = (
        "{model_type: mixtral, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2}"
    )
    with pytest.raises(UserError, match="mixtral cannot be planned, because it has to be tried out"):
        planner_of(small_config(f"model.decoder={mixture}"))


def test_masks_of_whole_rows_cost_memory_and_time():
    """Gemma 2 caps its logits, which only masked attention does."""
    planner = planner_of(small_config(decoder="gemma2"))
    planner.attention = "eager"
    masked = planner.plan(planner.given())
    planner.attention = "varlen"
    packed = planner.plan(planner.given())
    assert masked.memory.device["activations"] > packed.memory.device["activations"]
    assert masked.time.parts["decoder"] > packed.time.parts["decoder"]


@pytest.fixture(scope="module")
def large():
    """ViT-L/14 and 1.3 billion on 8 GPUs, 64 rows a step."""
    return planner_of(load_config(recipe_path("gpu_check"), ["train.global_batch_rows=64"]))


@pytest.fixture
def on_a_card_of(large, monkeypatch):
    """The same on cards of so many GiB."""

    def planner(memory_gib):
        monkeypatch.setattr(large, "gpu", replace(GPUS["h100"], memory_gib=memory_gib))
        return large

    return planner


def test_recomputing_takes_less_memory_and_more_time(large):
    plain, every, second = (large.plan(replace(large.given(), vision_every=k, decoder_every=k)) for k in (0, 1, 2))
    assert plain.memory.needed > second.memory.needed > every.memory.needed
    assert plain.time.total < second.time.total < every.time.total
    assert plain.mfu > every.mfu


def test_stages_and_offload_spread_what_they_say(large):
    def memory(stage, *offloads):
        return large.plan(replace(large.given(), stage=stage, **dict.fromkeys(offloads, True))).memory

    weights, masters = 2 * large.sizes.all, 12 * large.sizes.trained
    assert memory(0).device["masters and moments"] == masters
    assert memory(1).device["masters and moments"] == memory(3).device["masters and moments"] == masters / 8
    assert memory(2).device["weights"] == weights
    assert memory(3).device["weights"] == weights / 8
    off = memory(3, "offload_optimizer", "offload_weights")
    assert not {"masters and moments", "weights"} & off.device.keys()
    assert off.host["masters and moments"] == masters / 8
    assert off.host["weights"] == weights / 8


def test_muon_keeps_one_moment_of_a_matrix_and_an_average_keeps_the_tower():
    config = load_config(recipe_path("demo"), ["train.optimizer=muon", "train.ema_decay=0.99"])
    planner = planner_of(config, stage="zero2")
    model = planner.objective.model
    hidden = [w for tower in (model.vision, model.decoder, model.pooling) for w in tower.parameters() if w.dim() == 2]
    embedded = [w for n, w in model.named_parameters() if w.dim() == 2 and "embed" in n]
    expected = sum(w.numel() for w in hidden) - sum(w.numel() for w in embedded)
    assert sum(a * b for a, b in planner.sizes.matrices) == expected
    device = planner.plan(planner.given()).memory.device
    assert device["masters and moments"] == (12 * planner.sizes.trained - 4 * expected) / 8
    assert device["average"] == 4 * sum(w.numel() for w in model.vision.parameters()) / 8


def test_the_fastest_that_fits_comes_first_and_needs_no_more_than_there_is(on_a_card_of):
    found = search(on_a_card_of(16))
    times = [round(plan.time.total, 4) for plan in found.fitting]
    assert times == sorted(times)
    assert all(plan.memory.needed <= 16 * 2**30 for plan in found.fitting)
    assert 0 < len(found.fitting) < found.looked_at
    assert all(plan.memory.needed >= found.nearest.memory.needed for plan in found.fitting)
    assert what_would_fit(on_a_card_of(16), found) == f"what would fit: {settings_of(found.fitting[0])}"


def test_where_nothing_fits_it_says_what_would(on_a_card_of):
    planner = on_a_card_of(4.5)
    found = search(planner)
    assert found.fitting == []
    sentence = what_would_fit(planner, found)
    assert sentence.startswith("nothing would fit: stage 3, offload of optimizer and weights, ")
    short = found.nearest.memory.needed / 2**30 - 4.5
    assert sentence.endswith(f"still needs {short:.1f} GiB more; take {' or '.join(GPUS)}")


def test_rows_of_a_micro_step_divide_the_batch_and_hold_whole_groups():
    config = load_config(recipe_path("lcl_vit_l14_laion_mmc4"))
    planner = planner_of(config, gpus=64, contents=RowContents(2048, 6, 300, 6, 1e6, ""))
    assert rows_of(planner) == [4, 8, 16, 32, 64]


def test_settings_are_written_as_they_are_given():
    planner = planner_of(small_config())
    plan = planner.plan(Choice(3, 1, 0, 2, True, True))
    assert settings_of(plan) == (
        "stage 3, offload of optimizer and weights, train.accumulation_steps=2 (1 rows a GPU), "
        "model.vision.activation_checkpointing=false, model.decoder.activation_checkpointing=2"
    )


def test_exchanges_grow_with_bytes_and_ranks_and_slow_down_between_hosts():
    gpu = GPUS["h100"]
    one, eight, sixteen = Network.of(gpu, 1, 1), Network.of(gpu, 8, 1), Network.of(gpu, 16, 2)
    assert one.gather_s(1e9) == one.sum_s(1e9) == 0.0
    assert eight.gather_s(1e9) == pytest.approx(7 / 8 * 1e9 / (0.8 * 450e9), rel=0.02)
    assert sixteen.gather_s(1e9) == pytest.approx(15 / 16 * 1e9 / (0.8 * 50e9), rel=0.02)
    assert eight.sum_s(1e9) == pytest.approx(2 * eight.gather_s(1e9))
    assert sixteen.gather_s(1e9, ranks=8) == eight.gather_s(1e9)
    assert eight.gather_s(8, messages=100) == pytest.approx(100 * eight.gather_s(8), rel=0.01)


def test_a_secondary_copy_costs_memory_and_saves_exchanges_between_hosts():
    config = load_config(recipe_path("gpu_check"), ["train.global_batch_rows=128"])
    planner = planner_of(config, gpus=16, hosts=2)
    given = planner.plan(planner.given())
    planner.ds_config["zero_optimization"].update(zero_hpz_partition_size=8, stage3_max_live_parameters=0)
    spread = planner.plan(planner.given())
    planner.ds_config["zero_optimization"].update(zero_hpz_partition_size=1)
    assert spread.exchange.backward < planner.plan(planner.given()).exchange.backward
    assert given.layout.secondary == 1
    assert spread.layout.secondary == 8


def test_the_layout_is_deepspeeds_own_with_its_defaults():
    layout = Layout.of(zero_settings({"zero_optimization": {"stage": 3}}), "bf16", 4)
    assert (layout.stage, layout.overlap, layout.reduce_bucket, layout.keep_below) == (3, True, 500_000_000, 100_000)
    assert Layout.of(zero_settings({}), "fp32", 4).stage == 0


def test_a_vocabulary_is_found_without_the_network():
    published = load_config(recipe_path("lcl_vit_b16_laion"))
    assert vocabulary_of(published)[0].size == 49_413
    told = small_config("data.tokenizer=who/knows")
    assert "assumed" in vocabulary_of(told)[1]
    assert vocabulary_of(told, 100)[0].text_size == 100
    set_by_hand = small_config("data.tokenizer=who/knows", "model.decoder.vocab_size=505")
    assert vocabulary_of(set_by_hand)[0].size == 505


def test_another_gpu_comes_from_a_file(tmp_path):
    file = tmp_path / "card.yaml"
    numbers = {
        **{"peak_tflops": 100, "memory_gib": 20, "memory_gb_per_s": 500},
        **{"link_gb_per_s": 10, "network_gb_per_s": 1},
    }
    file.write_text(json.dumps(numbers))
    assert gpu_of(str(file)).memory_gib == 20
    assert gpu_of(str(file)).name == "card"
    file.write_text(json.dumps({**numbers, "memory_gib": -1, "colour": 3}))
    with pytest.raises(UserError, match="memory_gib: a positive number is expected, got -1") as error:
        gpu_of(str(file))
    assert "colour: unknown" in str(error.value)
    with pytest.raises(UserError, match="known: h100_pcie, h100, h200"):
        gpu_of("h300")
