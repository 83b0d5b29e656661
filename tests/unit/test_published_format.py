"""Checkpoints of the published code, in and out: ``python -m lcl_ds.convert --from reference``."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from lcl_ds.convert import main
from lcl_ds.data.sequences import DocumentView
from lcl_ds.data.stream.packing import Row, collate
from lcl_ds.errors import UserError
from lcl_ds.models.build import build_empty_model
from lcl_ds.models.initial import fill_weights
from lcl_ds.models.vision import released_patch_tokens
from lcl_ds.models.weights.published import load_published, read_published_config
from lcl_ds.models.weights.transfer import given_weights
from tests.support.golden import GOLDEN, Golden, sequences_of
from tests.support.small import small_config, small_model


@pytest.fixture
def golden():
    return Golden(GOLDEN["documents"])


@pytest.fixture
def config_file(golden, tmp_path):
    path = tmp_path / "LCL_tiny.json"
    path.write_text(json.dumps(golden.config))
    return path


def convert(*arguments) -> int:
    return main(["--from", "reference", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["plain", "module", "nested", "safetensors"])
def test_every_kind_of_file_becomes_the_same_encoder(golden, config_file, tmp_path, kind, capsys):
    source = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    match kind:
        case "safetensors":
            save_file(golden.weights, source)
        case "plain":
            torch.save(golden.weights, source)
        case "module":
            torch.save({f"module.{name}": weight for name, weight in golden.weights.items()}, source)
        case "nested":
            torch.save({"epoch": 3, "state_dict": golden.weights}, source)
    assert convert(source, "--config", config_file, tmp_path / "out") == 0
    assert "max abs difference 0.0e+00 over 16 images of noise" in capsys.readouterr().out
    encoder = CLIPVisionModel.from_pretrained(tmp_path / "out").eval()
    model = load_published(golden.weights, golden.config)
    with torch.no_grad():
        pixels = golden.batch["images"]
        assert torch.equal(released_patch_tokens(encoder, pixels), model.vision(pixels))


def test_the_published_layout_comes_out_as_it_went_in(golden, config_file, tmp_path):
    save_file(golden.weights, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    assert convert(tmp_path / "model.safetensors", out, "--config", config_file, "--format", "reference") == 0
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == golden.weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in golden.weights.items())
    written = read_published_config(json.loads((out / "config.json").read_text()))
    assert written == read_published_config(golden.config)


def test_names_and_shapes_that_do_not_fit_are_all_listed(golden):
    weights = dict(golden.weights)
    weights["visual.proj"] = weights.pop("visual.conv1.weight")
    weights["text.text_projection"] = torch.zeros(3, 3)
    with pytest.raises(UserError) as error:
        load_published(weights, golden.config)
    assert error.value.problems == [
        "state dict: text.text_projection is [3, 3], the configuration says [48, 48]",
        "state dict: visual.conv1.weight is missing",
        "state dict: visual.proj is not part of the model",
    ]


class Payload:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [Payload(), {"state_dict": [1, 2]}, 5])
def test_nothing_but_tensors_is_read(content, config_file, tmp_path, capsys):
    torch.save(content, tmp_path / "model.pt")
    assert convert(tmp_path / "model.pt", tmp_path / "out", "--config", config_file) == 2
    printed = capsys.readouterr()
    assert "model.pt" in printed.err
    assert "executed" not in printed.out
    assert not (tmp_path / "out").exists()


def test_mistakes_are_sentences(golden, config_file, tmp_path, capsys):
    save_file(golden.weights, tmp_path / "model.safetensors")
    source, out = tmp_path / "model.safetensors", tmp_path / "out"
    assert convert(source, out) == 2
    assert "--from reference needs --config" in capsys.readouterr().err
    assert convert(source, out, "--config", source) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"vision_cfg": {}}')
    assert convert(source, out, "--config", tmp_path / "other.json") == 2
    assert "other.json: not a configuration of the published LCL: 'text_cfg' is missing" in capsys.readouterr().err
    assert convert(source, out, "--config", config_file, "--format", "reference", "--part", "vision") == 2
    assert "leave out --part vision" in capsys.readouterr().err


def test_a_published_model_is_continued_with_rows_longer_than_its_position_table(golden, config_file, tmp_path):
    """Documents stay as long as the table; a row packs as many as it holds, and its padding stays within the table."""
    save_file(golden.weights, tmp_path / "model.safetensors")
    assert convert(tmp_path / "model.safetensors", tmp_path / "out", "--config", config_file, "--part", "full") == 0
    published_config = read_published_config(golden.config)
    towers = published_config.model.model_dump(mode="json")
    keys = {part: {k: v for k, v in towers[part].items() if k != "attention"} for part in ("vision", "decoder")}
    table = published_config.context_length
    config = small_config(
        *(f"model.{part}={json.dumps(values)}" for part, values in keys.items()),
        f"model.pooling.num_attention_heads={published_config.model.pooling.num_attention_heads}",
        *(f"model.init_from={tmp_path / 'out'}", f"data.row_tokens={4 * table}", f"data.document_tokens={table}"),
    )
    model = build_empty_model(config.model, published_config.vocab_size, config.data.longest_document)
    given, _ = given_weights(model, config.model, published_config.vocabulary.text_size, seed=1)
    fill_weights(model, 1, given)
    published = load_published(golden.weights, golden.config)
    assert all(torch.equal(weight, published.state_dict()[name]) for name, weight in model.state_dict().items())

    sequences = sequences_of(golden, published_config)
    image_size = published_config.model.vision.hf_keys["image_size"]
    row = [sequences[0], sequences[1]]
    packed = collate([Row(tuple(row))], 4 * table, image_size, published_config.vocabulary, DocumentView.readout_names)
    alone = collate([Row((row[1],))], table, image_size, published_config.vocabulary, DocumentView.readout_names)
    lengths = [len(sequence.tokens.input_ids) for sequence in row]
    with torch.no_grad():
        second = model(packed)[0][lengths[0] : sum(lengths)]
        torch.testing.assert_close(second, published(alone)[0][: lengths[1]], rtol=1e-4, atol=1e-5)

    longer = build_empty_model(config.model, published_config.vocab_size, table + 1)
    with pytest.raises(UserError, match="lower data.document_tokens"):
        given_weights(longer, config.model, published_config.vocabulary.text_size, seed=1)


def test_a_table_that_is_given_too_short_is_refused():
    config = small_config("model.decoder.n_positions=40", decoder="gpt2")
    with pytest.raises(UserError, match="position table has 40 rows, documents may have 48 tokens"):
        small_model(config)
    small_model(small_config("model.decoder.max_position_embeddings=40"))  # rotary: no table
