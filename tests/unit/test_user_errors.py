"""A user's mistake ends within seconds with sentences that name file and key, and exit code 2."""

import json
import resource
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from lcl_ds.models import build
from lcl_ds.train import main
from tests.support.ranks import ROOT
from tests.support.small import small_config


@pytest.fixture
def start(tmp_path, demo_folder, monkeypatch, capsys):
    """Run ``launch/train.py`` with changed files; no model may be built."""

    def refuse(*_):
        raise AssertionError("a model was built before the mistake was found")

    monkeypatch.setattr(build, "LCLModel", refuse)

    def start(*overrides, recipe=None, ds_config=None):
        shards, tokenizer = f"{demo_folder}/train-documents-*.tar", f"{demo_folder}/tokenizer"
        tree = small_config(
            f"data.shards={shards}", f"data.tokenizer={tokenizer}", "data.row_tokens=192", "evaluation.shards=null"
        ).model_dump(mode="json")
        (recipe or (lambda tree: None))(tree)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
        (tmp_path / "ds.json").write_text(json.dumps(ds_config or {"zero_optimization": {"stage": 3}}))
        files = ["--recipe", str(tmp_path / "recipe.yaml"), "--ds_config", str(tmp_path / "ds.json")]
        code = main([*files, "--run_dir", str(tmp_path / "run"), *overrides])
        if dist.is_initialized():
            dist.destroy_process_group()
        assert not (tmp_path / "run" / "config.yaml").exists()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.err

    return start


def test_a_mistyped_recipe_key(start, tmp_path):
    code, err = start(recipe=lambda tree: tree["train"].update(lerning_rate=1))
    assert code == 2
    assert err == (
        f"error: {tmp_path / 'recipe.yaml'}: train.lerning_rate: unknown setting (did you mean 'learning_rate'?)\n"
    )


@pytest.mark.parametrize(
    ("ds_config", "message"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation: unknown key (did you mean 'zero_optimization'?)"),
        ({"zero_optimization": {"stagee": 3}}, "zero_optimization.stagee: unknown key (did you mean 'stage'?)"),
        ({"zero_optimization": {"stage": 9}}, "zero_optimization.stage: Input should be 0, 1, 2"),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled: "auto" has no meaning here'),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, 'zero_optimization.reduce_bucket_size: "auto" has no'),
        ({"gradient_clipping": 1.0}, "gradient_clipping: belongs in the recipe, as train.gradient_clipping"),
    ],
)
def test_a_mistake_in_the_ds_config(start, tmp_path, ds_config, message):
    code, err = start(ds_config=ds_config)
    assert code == 2
    assert f"error: {tmp_path / 'ds.json'}: {message}" in err


def test_a_missing_data_path(start, tmp_path):
    code, err = start(f"data.shards={tmp_path}/nothing-*.tar")
    assert (code, err) == (2, f"error: data.shards: data: data path {tmp_path}/nothing-*.tar: no such file\n")


def test_an_unreadable_shard(start, tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"this is no tar" * 100)
    code, err = start(f"data.shards={tmp_path}/bad.tar")
    assert code == 2
    assert err.startswith(f"error: data.shards: data: shard {tmp_path}/bad.tar: cannot be read: ")
    assert err.count("\n") == 1


def test_missing_held_out_shards_are_found_before_training(start, tmp_path):
    code, err = start(f"evaluation.shards={tmp_path}/held-out.tar")
    assert (code, err) == (2, f"error: evaluation.shards: data path {tmp_path}/held-out.tar: no such file\n")


def test_a_tracker_that_is_not_installed_is_found_before_training(start):
    code, err = start("log.trackers=[aim]")
    assert (code, err) == (2, "error: log.trackers: aim is not installed: pip install aim\n")


def test_a_vocabulary_that_does_not_match(start, demo_folder):
    code, err = start("model.decoder.vocab_size=50000")
    assert code == 2
    assert f"error: model.decoder.vocab_size: 50000 does not match data.tokenizer {demo_folder}/tokenizer with" in err


def test_a_tokenizer_that_is_not_there(start, tmp_path):
    code, err = start(f"data.tokenizer={tmp_path}/none")
    assert code == 2
    assert err.startswith(f"error: data.tokenizer: no tokenizer at {tmp_path}/none")


def test_missing_files(start, tmp_path, capsys):
    assert main(["--recipe", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: there is no such file" in capsys.readouterr().err
    assert main(["--ds_config", str(tmp_path / "none.json")]) == 2
    assert f"error: {tmp_path / 'none.json'}: cannot be read as JSON" in capsys.readouterr().err


def test_print_config_shows_the_resolved_settings_and_dry_run_one_batch(tmp_path, demo_folder, capsys):
    assert main(["--print_config", "train.steps=7"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == 7
    data = [f"data.shards={demo_folder}/train-documents-*.tar", f"data.tokenizer={demo_folder}/tokenizer"]
    assert main(["--dry_run", "data.demo=null", "evaluation.shards=null", *data]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["samples"] == {"data": 160}
    assert shown["first_micro_batch_of_one_rank"]["padding_fraction"] < 0.05


def test_a_dry_run_says_how_a_run_spreads_over_ranks_that_are_not_there(demo_folder, capsys):
    data = [f"data.shards={demo_folder}/train-documents-*.tar", f"data.tokenizer={demo_folder}/tokenizer"]
    command = ["--dry_run", "data.demo=null", "evaluation.shards=null", *data, "train.global_batch_rows=128"]
    assert main([*command, "--gpus", "64", "data.lanes=8", "data.workers=2"]) == 0
    shown = capsys.readouterr().out
    shown = yaml.safe_load(shown[shown.index("samples:") :])
    spread = shown["spread"]
    assert (spread["ranks"], spread["rows_of_a_rank_and_micro_step"], spread["loader_processes"]) == (64, 2, 128)
    assert [*spread["images_of_first_micro_batch"]] == ["rank 0", "rank 63"]
    assert shown["ds_config"]["train_micro_batch_size_per_gpu"] == 2
    (note,) = spread["notes"]
    assert note.startswith("data.lanes: 128 loader processes take rows from 8 lanes, so 16 of them read and pack every")


def test_a_dry_run_names_everything_that_does_not_fit_the_ranks(demo_folder, tmp_path, capsys):
    engine = tmp_path / "hpz.json"
    engine.write_text('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}')
    command = ["--dry_run", "--ds_config", str(engine), "train.global_batch_rows=96", "data.group_rows=4"]
    assert main([*command, "--gpus", "20"]) == 2
    err = capsys.readouterr().err
    assert "error: train.global_batch_rows: 96 is not a multiple of train.accumulation_steps x ranks" in err
    assert "12, 24 ranks would do" in err
    assert "zero_optimization.zero_hpz_partition_size: 8 does not divide 20 ranks" in err
    assert main(["--gpus", "64"]) == 2
    assert "--gpus 64: goes with --dry_run" in capsys.readouterr().err


def test_a_dry_run_of_a_large_model_needs_no_memory_for_its_weights(demo_folder, capsys):
    data = [f"data.shards={demo_folder}/train-documents-*.tar", f"data.tokenizer={demo_folder}/tokenizer"]
    sizes = "hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32, num_attention_heads: 32"
    towers = ["model.vision={shape: vit_6b14}", f"model.decoder={{model_type: llama, {sizes}}}", "data.row_tokens=512"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["--dry_run", "data.demo=null", "evaluation.shards=null", *data, *towers]) == 0
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    shown = capsys.readouterr().out
    parameters = yaml.safe_load(shown[shown.index("samples:") :])["parameters"]
    assert parameters["vision"] == 5_902_956_800
    assert parameters["decoder"] == 6_478_123_008
    assert kibibytes < 1 << 20, "weights of 12 billion parameters would be 46 GiB"


def test_a_pretrained_decoder_brings_its_tokenizer(tmp_path, demo_folder, capsys):
    tokenizer = json.loads((demo_folder / "tokenizer" / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    keys = {"model_type": "gpt2", "n_embd": 128, "n_layer": 1, "n_head": 2, "vocab_size": len(ids)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys)).save_pretrained(tmp_path)
    data = [f"data.shards={demo_folder}/train-documents-*.tar", f"data.tokenizer={demo_folder}/tokenizer"]
    command = ["--dry_run", "data.demo=null", "evaluation.shards=null", *data]
    command.append(f"model.decoder={{pretrained: {tmp_path}}}")

    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(command) == 0
    shown = capsys.readouterr().out  # DeepSpeed may have said something on being imported
    (sentence,) = yaml.safe_load(shown[shown.index("samples:") :])["given_weights"]
    assert sentence == f"model.decoder.pretrained: {tmp_path}: 17 weights"

    weights = load_file(tmp_path / "model.safetensors")
    save_file({n: w for n, w in weights.items() if not n.endswith("ln_f.bias")}, tmp_path / "model.safetensors")
    assert main(command) == 2, "a dry run compares names though its model has no memory for weights"
    assert "ln_f.bias is missing; allow it with model.allow_missing" in capsys.readouterr().err
    save_file(weights, tmp_path / "model.safetensors")

    first, second = list(ids)[:2]
    ids[first], ids[second] = ids[second], ids[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(command) == 2
    assert (
        f"is not the tokenizer of model.decoder.pretrained: {first!r} is 0 here and 1 there" in capsys.readouterr().err
    )


def test_a_mistake_shows_no_traceback_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "launch/train.py", f"data.shards={tmp_path}/x.tar", "data.demo=null"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"error: data.shards: data: data path {tmp_path}/x.tar: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_no_run_s_is_refused_before_anything_is_written(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    code, err = start()
    assert (code, "run: holds thesis.tex and is no run's folder" in err) == (2, True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_folder_that_cannot_be_made_is_found_before_a_model_is_built(start, tmp_path):
    (tmp_path / "file").touch()
    code, err = start("--run_dir", str(tmp_path / "file" / "run"))
    assert code == 2
    assert f"error: {tmp_path}/file/run: cannot be written to" in err
