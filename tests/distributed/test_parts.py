"""Every decoder family, vision tower and frozen part: three steps on two ranks at stage 3, stopped and continued."""

import json
from typing import get_args

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lcl_ds.assembly import lane_settings
from lcl_ds.convert import main
from lcl_ds.data.corpus import open_data
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.models.build import build_model
from lcl_ds.models.settings import Part, part_of
from lcl_ds.objectives import build_objective
from lcl_ds.objectives.base import local_normalizers
from tests.support.ranks import on_ranks
from tests.support.runs import without_timing
from tests.support.small import DECODERS, VISION_TOWERS, small_config

pytestmark = pytest.mark.timeout(400)
DROPOUT = "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, resid_pdrop: 0.1, embd_pdrop: 0.1}"
CASES = {
    "llama, CLIP tower": [],
    "gpt2 with dropout": [f"model.decoder={DROPOUT}"],
    "pretrained gpt2": ["model.decoder={pretrained: FOLDER/gpt2}", "train.learning_rate_factors={decoder: 0}"],
    "mistral, SigLIP tower": [
        f"model.decoder={DECODERS['mistral']}",
        f"model.vision={VISION_TOWERS['siglip_vision_model']}",
    ],
    "qwen2, SigLIP 2 tower": [
        f"model.decoder={DECODERS['qwen2']}",
        f"model.vision={VISION_TOWERS['siglip2_vision_model']}",
    ],
    "qwen3, patch dropout": [f"model.decoder={DECODERS['qwen3']}", "model.vision.patch_dropout=0.5"],
    "gemma": [f"model.decoder={DECODERS['gemma']}", "train.learning_rate_factors={vision: 0}"],
    "gemma2": [f"model.decoder={DECODERS['gemma2']}", "train.learning_rate_factors={pooling: 0}"],
    "gemma3_text": [f"model.decoder={DECODERS['gemma3_text']}", "train.learning_rate_factors={heads: 0}"],
    "opt": [f"model.decoder={DECODERS['opt']}", "train.learning_rate_factors={vision: 0, decoder: 0.1}"],
    "llama and vision frozen": ["train.learning_rate_factors={vision: 0, decoder: 0}"],
}
"""Overrides of runs that have together every family of decoders and towers and every part frozen, some at once."""
FROZEN = {
    "pretrained gpt2": ["decoder"],
    "gemma": ["vision"],
    "gemma2": ["pooling"],
    "gemma3_text": ["heads"],
    "opt": ["vision"],
    "llama and vision frozen": ["vision", "decoder"],
}
"""Parts that stay as they are, by case."""
TOWERS = {
    "llama, CLIP tower": "clip_vision_model",
    "mistral, SigLIP tower": "siglip_vision_model",
    "qwen2, SigLIP 2 tower": "siglip2_vision_model",
}
PATCH_DROPOUT = "qwen3, patch dropout"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_folder):
    """Where the ranks work: with the demo corpus, a published decoder and the overrides of every case."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = len(json.loads((demo_folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    keys = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": tokenizer, "n_positions": 96}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys)).save_pretrained(folder / "gpt2")
    shared = [
        f"data.shards={demo_folder}/train-*-*.tar",
        f"data.tokenizer={demo_folder}/tokenizer",
        *("data.row_tokens=96", "data.row_images=4", "data.lanes=4", "data.pack_window=16", "evaluation.shards=null"),
        *("train.steps=3", "train.global_batch_rows=4", "train.warmup_steps=0", "checkpoint.every=2"),
    ]
    cases = {name: [*shared, *(o.replace("FOLDER", str(folder)) for o in own)] for name, own in CASES.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return on_ranks(2, "stop_and_continue", folder, timeout=390)[0]


def metrics(text):
    return without_timing([json.loads(line) for line in text.splitlines()])


@pytest.mark.parametrize("name", CASES)
def test_a_continued_run_equals_an_uninterrupted_one(runs, name):
    run = runs[name]
    assert [step["step"] for step in metrics(run["whole"])] == [1, 2, 3]
    assert metrics(run["again"]) == metrics(run["whole"])
    assert all(torch.equal(weight, run["after_again"][n]) for n, weight in run["after"].items())


@pytest.mark.parametrize("name", CASES)
def test_frozen_parts_stay_to_the_last_bit_and_all_others_move(runs, name):
    run, frozen = runs[name], FROZEN.get(name, [])
    for n, weight in run["after"].items():
        assert torch.equal(weight, run["before"][n]) == (part_of(n) in frozen), n


@pytest.mark.parametrize("name", TOWERS)
def test_a_run_of_any_tower_is_released(runs, folder, tmp_path, name, capsys):
    assert main([str(folder / "stop_and_continue" / name), str(tmp_path / "out")]) == 0
    difference = float(capsys.readouterr().out.split("max abs difference ")[1].split()[0])
    assert difference <= 1e-5
    released = AutoModel.from_pretrained(tmp_path / "out")
    assert released.config.model_type == TOWERS[name]
    after = runs[name]["after"]
    assert all(torch.equal(w, after[f"model.vision.model.{n}"]) for n, w in released.named_parameters())


def overrides(folder, name):
    return json.loads((folder / "cases.json").read_text())[name]


def test_patches_dropped_on_two_ranks_are_those_of_one_process(runs, folder):
    config = small_config(*overrides(folder, PATCH_DROPOUT))
    data = open_data(config.data)
    batch = next(BatchLoader(data.sources, lane_settings(config), data.tokenizer, rows_per_batch=4))
    model = build_model(config.model, data.tokenizer.vocabulary.size, config.data.row_tokens, config.seed("init"))
    objective = build_objective(model, config.objective, config.seed("init"))
    with torch.no_grad():
        losses = objective(batch, *local_normalizers(objective, batch))
    first = metrics(runs[PATCH_DROPOUT]["whole"])[0]
    for key in ("loss", *objective.losses):
        assert first[key] == pytest.approx(losses[key].item(), rel=1e-5), key


def test_a_run_starts_from_the_weights_of_the_folder(runs, folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder / "gpt2").transformer
    before = runs["pretrained gpt2"]["before"]
    for n, weight in theirs.named_parameters():
        ours = before.get(f"model.decoder.{n}", before.get(f"model.lm_head.norm.{n.split('.')[-1]}"))
        assert torch.equal(ours[: len(weight)], weight), n


def test_every_family_has_a_case():
    named = " ".join(override for overrides in CASES.values() for override in overrides)
    assert {family for family in DECODERS if f"model_type: {family}," in named} == set(DECODERS) - {"llama"}
    assert set(TOWERS.values()) == set(VISION_TOWERS) - {"dinov2"}
    assert {part for parts in FROZEN.values() for part in parts} == set(get_args(Part))
