"""Every decoder family, vision tower and frozen part: five steps on two ranks at stage 3, stopped and continued."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lcl_ds.assembly import lane_settings
from lcl_ds.convert import main
from lcl_ds.data.corpus import open_data
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.models.build import build_model
from lcl_ds.models.settings import part_of
from lcl_ds.objectives import build_objective
from lcl_ds.objectives.base import local_normalizers
from tests.support.ranks import on_ranks
from tests.support.runs import without_timing
from tests.support.small import DECODERS, VISION_TOWERS, small_config

FROZEN = {
    **{part: [part] for part in ("vision", "pooling", "decoder", "heads")},
    "vision+decoder": ["vision", "decoder"],
}
CASES = {
    **{f"decoder {family}": [f"model.decoder={keys}"] for family, keys in DECODERS.items()},
    **{f"tower {family}": [f"model.vision={keys}"] for family, keys in VISION_TOWERS.items() if family != "dinov2"},
    **{
        f"frozen {name}": [f"train.learning_rate_factors={{{', '.join(f'{part}: 0' for part in parts)}}}"]
        for name, parts in FROZEN.items()
    },
    "patch dropout": ["model.vision.patch_dropout=0.5"],
    "pretrained": ["model.decoder={pretrained: FOLDER/gpt2}", "train.learning_rate_factors={decoder: 0}"],
}


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
        *("train.steps=5", "train.global_batch_rows=4", "train.warmup_steps=0", "checkpoint.every=3"),
    ]
    cases = {name: [*shared, *(o.replace("FOLDER", str(folder)) for o in own)] for name, own in CASES.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return on_ranks(2, "stop_and_continue", folder, timeout=170)[0]


def metrics(text):
    return without_timing([json.loads(line) for line in text.splitlines()])


@pytest.mark.parametrize("name", CASES)
def test_a_continued_run_equals_an_uninterrupted_one(runs, name):
    run = runs[name]
    assert [step["step"] for step in metrics(run["whole"])] == [1, 2, 3, 4, 5]
    assert metrics(run["again"]) == metrics(run["whole"])
    assert all(torch.equal(weight, run["after_again"][n]) for n, weight in run["after"].items())


@pytest.mark.parametrize("name", CASES)
def test_frozen_parts_stay_to_the_last_bit_and_all_others_move(runs, name):
    run, frozen = runs[name], FROZEN.get(name.removeprefix("frozen "), [])
    frozen = ["decoder"] if name == "pretrained" else frozen
    for n, weight in run["after"].items():
        assert torch.equal(weight, run["before"][n]) == (part_of(n) in frozen), n


@pytest.mark.parametrize("family", [name for name in CASES if name.startswith("tower ")])
def test_a_run_of_any_tower_is_released(runs, folder, tmp_path, family, capsys):
    assert main([str(folder / family), str(tmp_path / "out")]) == 0
    difference = float(capsys.readouterr().out.split("max abs difference ")[1].split()[0])
    assert difference <= 1e-5
    released = AutoModel.from_pretrained(tmp_path / "out")
    assert released.config.model_type == family.removeprefix("tower ")
    after = runs[family]["after"]
    assert all(torch.equal(w, after[f"model.vision.model.{n}"]) for n, w in released.named_parameters())


def overrides(folder, name):
    return json.loads((folder / "cases.json").read_text())[name]


def test_patches_dropped_on_two_ranks_are_those_of_one_process(runs, folder):
    config = small_config(*overrides(folder, "patch dropout"))
    data = open_data(config.data)
    batch = next(BatchLoader(data.sources, lane_settings(config), data.tokenizer, rows_per_batch=4))
    model = build_model(config.model, data.tokenizer.vocabulary.size, config.data.row_tokens, config.seed("init"))
    objective = build_objective(model, config.objective, config.seed("init"))
    with torch.no_grad():
        losses = objective(batch, *local_normalizers(objective, batch))
    first = metrics(runs["patch dropout"]["whole"])[0]
    for key in ("loss", *objective.losses):
        assert first[key] == pytest.approx(losses[key].item(), rel=1e-5), key


def test_a_run_starts_from_the_weights_of_the_folder(runs, folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder / "gpt2").transformer
    before = runs["pretrained"]["before"]
    for n, weight in theirs.named_parameters():
        ours = before.get(f"model.decoder.{n}", before.get(f"model.lm_head.norm.{n.split('.')[-1]}"))
        assert torch.equal(ours[: len(weight)], weight), n
