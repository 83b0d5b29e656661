"""A release of the whole network: transformers runs it, and it computes what was trained."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from lcl_ds.data.sequences import DocumentView
from lcl_ds.data.stream.packing import PackedSequence, Row, collate
from lcl_ds.errors import UserError
from lcl_ds.models.build import build_model
from lcl_ds.models.weights.transfer import release_settings
from lcl_ds.release.full import older_names, release_full
from lcl_ds.release.options import ReleaseOptions
from lcl_ds.release.origin import WeightOrigin, published_settings
from lcl_ds.tokens import CONTROL_TOKENS, TextTokenizer, encode_sequence
from tests.support.small import IMAGE_SIZE, ROW_TOKENS, VISION_TOWERS, shake, small_config

SEEN_WHOLE = ["model.decoder.bidirectional_images=true", "model.decoder.sliding_window=5"]
ROTARY = "model.decoder.rope_parameters="
SCALED = "rope_type: llama3, rope_theta: 500.0, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0"
CASES = {
    "clip, llama": ("clip_vision_model", "llama", [f"{ROTARY}{{rope_type: default, rope_theta: 500.0}}"]),
    "siglip, gpt2": ("siglip_vision_model", "gpt2", []),
    "siglip2, gemma2, images seen whole": (
        "siglip2_vision_model",
        "gemma2",
        [*SEEN_WHOLE, "model.decoder.attn_logit_softcapping=5.0"],
    ),
    "dinov2, mistral, images seen whole": ("dinov2", "mistral", SEEN_WHOLE),
    "clip, opt, images seen whole": ("clip_vision_model", "opt", SEEN_WHOLE[:1]),
}
OLDER_NAMES = {
    "scaled positions": (
        "clip_vision_model",
        "llama",
        [f"{ROTARY}{{{SCALED}, original_max_position_embeddings: 16}}"],
    ),
    "positions by kind of layer": (
        "clip_vision_model",
        "gemma3_text",
        [
            f"{ROTARY}{{full_attention: {{rope_type: default, rope_theta: 500.0}}, "
            "sliding_attention: {rope_type: default, rope_theta: 50.0}}",
            "model.decoder.layer_types=[sliding_attention, full_attention]",
        ],
    ),
}
"""Positions that transformers 4 reads under other names than version 5."""
BEFORE, AFTER = "a large red circle", "and a small square"


class Released:
    """A small network of which every weight was moved, and its release."""

    def __init__(self, folder, tokenizer, tower="clip_vision_model", decoder="llama", overrides=(), scale=0.3):
        self.folder, self.tokenizer = folder, TextTokenizer(tokenizer)
        self.settings = f"model.vision={VISION_TOWERS[tower]}", f"data.tokenizer={tokenizer}", *overrides
        self.config = small_config(*self.settings, decoder=decoder)
        vocabulary = self.tokenizer.vocabulary
        self.model = build_model(self.config.model, vocabulary.size, self.config.data.longest_document, seed=0).eval()
        shake(self.model, scale=scale)
        size = self.model.vision.model.config.image_size
        self.pixels = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)
        self.inputs = {"pixel_values": self.model.vision.normalize(torch.from_numpy(self.pixels))}
        self.batch, self.ids = self._document(self.pixels)
        self.release(folder, self.config)

    def release(self, folder, config, contents=None, **options):
        settings = published_settings(config.model_dump(mode="json"))
        facts = {"config": config, "tokenizer_contents": contents}
        origin = WeightOrigin("small", "", settings, self.pixels, "noise", **facts)
        return release_full(self.model, origin, self.tokenizer.vocabulary, folder, ReleaseOptions(**options))

    def _document(self, pixels):
        vocabulary = self.tokenizer.vocabulary
        (tokens,) = encode_sequence(
            [BEFORE, 0, AFTER], self.tokenizer.encode, vocabulary, self.model.vision.patch_tokens, ROW_TOKENS, 1
        )
        tokens = DocumentView().annotate(tokens, vocabulary)
        row = Row((PackedSequence("document", tokens, pixels),))
        return collate([row], ROW_TOKENS, pixels.shape[-1], vocabulary, ("context",)), torch.from_numpy(
            tokens.input_ids
        )

    def load(self, **options):
        model, loading = AutoModel.from_pretrained(
            self.folder, trust_remote_code=True, output_loading_info=True, **options
        )
        assert not any(loading.values()), loading
        return model


@pytest.fixture
def release(tmp_path, demo_folder):
    return lambda *case, **options: Released(tmp_path, demo_folder / "tokenizer", *case, **options)


def test_one_transformer_for_both_is_refused(release):
    with pytest.raises(UserError, match="--part full: genlip reads text with the vision tower's blocks"):
        release(overrides=["objective.name=genlip"])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_features_and_losses_of_the_release_are_those_of_training(release, case):
    trained = release(*CASES[case])
    states, pooled = trained.model(trained.batch)
    image, context = trained.model.pair_features(states, pooled, trained.batch)
    labels = trained.batch.labels
    loss = trained.model.lm_head(states[trained.batch.label_positions], labels, float(len(labels)))

    model, vocabulary = trained.load(), trained.tokenizer.vocabulary
    texts = AutoTokenizer.from_pretrained(trained.folder, trust_remote_code=True)(BEFORE, return_tensors="pt")
    found_image = F.normalize(model.get_image_features(**trained.inputs), dim=-1)
    found_context = F.normalize(model.get_text_features(**texts), dim=-1)
    wanted = trained.ids.masked_fill((trained.ids == vocabulary.image) | (trained.ids == vocabulary.eoi), -100)
    found_loss = model(input_ids=trained.ids[None], labels=wanted[None], **trained.inputs).loss

    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found_image, image, **close)
    torch.testing.assert_close(found_context, context, **close)
    torch.testing.assert_close(found_loss, loss, **close)
    scale = trained.model.logit_scale()
    torch.testing.assert_close(model.similarity(found_image, found_context), scale * image @ context.T, **close)


@torch.no_grad()
def test_texts_of_different_lengths_are_read_at_their_ends(release):
    trained = release()
    model, tokenizer = trained.load(), AutoTokenizer.from_pretrained(trained.folder, trust_remote_code=True)
    texts = [BEFORE, "a circle", "a large red circle and a small square"]
    alone = torch.cat([model.get_text_features(**tokenizer(text, return_tensors="pt")) for text in texts])
    for tokenizer.padding_side in ("right", "left"):
        together = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt"))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["gpt2", "llama"])
def test_texts_with_several_images_go_on_alone_as_in_a_batch_and_in_beams(release, decoder):
    trained = release("clip_vision_model", decoder)
    model, image = trained.load(), trained.inputs["pixel_values"]
    images = torch.cat([image, image.flip(3), image.flip(2)])
    block = model.image_prompt(1)[0, 1:]
    long, short = torch.cat([torch.tensor([5, 6]), block, torch.tensor([7]), block]), torch.cat([block, block[:0]])
    fill = torch.full((len(long) - len(short),), trained.tokenizer.vocabulary.eot)
    together = {
        "input_ids": torch.stack([long, torch.cat([fill, short])]),
        "attention_mask": torch.stack([torch.ones_like(long), torch.cat([0 * fill, torch.ones_like(short)])]),
    }
    for options in ({"do_sample": False}, {"num_beams": 3}):
        rows = [
            model.generate(text[None], pixel_values=shown, max_new_tokens=4, **options)[0, len(text) :]
            for text, shown in ((long, images[:2]), (short, images[2:]))
        ]
        both = model.generate(**together, pixel_values=images, max_new_tokens=4, **options)[:, len(long) :]
        for row, alone in zip(both, rows, strict=True):
            assert row[: len(alone)].tolist() == alone.tolist()


@torch.no_grad()
def test_images_and_places_that_do_not_fit_are_refused(release):
    trained = release()
    model, image = trained.load(), trained.inputs["pixel_values"]
    text = torch.tensor([[1, 2]])
    for ids, images in (
        (model.image_prompt(1), image.repeat(3, 1, 1, 1)),
        (model.image_prompt(1), None),
        (text, image),
    ):
        with pytest.raises(ValueError, match="images for . times 4 image tokens"):
            model(input_ids=ids, pixel_values=images)


@torch.no_grad()
def test_captions_are_the_most_likely_tokens_one_after_the_other(release):
    trained = release()
    model = trained.load()
    ids = model.image_prompt(1)
    vocabulary = trained.tokenizer.vocabulary
    never = [vocabulary.sot, vocabulary.image, vocabulary.eoi]
    for _ in range(6):
        logits = model(input_ids=ids, use_cache=False, **trained.inputs).logits[0, -1]
        logits[never] = -torch.inf
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        if ids[0, -1] == vocabulary.eot:
            break
    found = model.caption(**trained.inputs, max_new_tokens=6, do_sample=False)
    assert found[0].tolist() == ids[0, model.image_prompt(1).shape[1] :].tolist()
    model.lm_head.weight[vocabulary.image] = 2 * model.lm_head.weight[found[0, 0]]  # would be the most likely one now
    assert torch.equal(model.caption(**trained.inputs, max_new_tokens=6, do_sample=False), found)


def test_its_tokenizer_writes_what_features_are_read_of(release):
    trained = release()
    tokenizer = AutoTokenizer.from_pretrained(trained.folder, trust_remote_code=True)
    vocabulary = trained.tokenizer.vocabulary
    assert tokenizer(BEFORE).input_ids == [vocabulary.sot, *trained.tokenizer.encode(BEFORE), vocabulary.soi]
    named = "a <start_of_image> and <image>"
    assert tokenizer(named).input_ids[1:-1] == trained.tokenizer.encode(named)  # names of tokens are text in a text
    cut = tokenizer(50 * BEFORE, truncation=True).input_ids
    assert (len(cut), cut[0], cut[-1]) == (ROW_TOKENS, vocabulary.sot, vocabulary.soi)
    assert tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(range(vocabulary.text_size, vocabulary.size))


def test_what_an_objective_did_not_train_is_refused(release):
    clip = release("clip_vision_model", "llama", ["objective.name=clip"])
    model, vocabulary = clip.load(), clip.tokenizer.vocabulary
    tokenizer = AutoTokenizer.from_pretrained(clip.folder, trust_remote_code=True)
    assert tokenizer(BEFORE).input_ids[-1] == vocabulary.eot  # where this objective reads a text
    assert model.get_image_features(**clip.inputs).shape == (1, 32)
    with pytest.raises(RuntimeError, match="did not train the next token"):
        model.caption(**clip.inputs)


@pytest.mark.parametrize(
    "objective", [["objective.name=generation"], ["objective.name=masked"], ["objective.contrastive_weight=0"]], ids=str
)
def test_a_network_that_compares_nothing_says_so(release, objective):
    model = (generation := release("clip_vision_model", "llama", objective)).load()
    with pytest.raises(RuntimeError, match="did not train features of images and texts"):
        model.get_image_features(**generation.inputs)
    assert "get_image_features" not in (generation.folder / "README.md").read_text()


def test_the_card_runs_as_printed(release, tmp_path, monkeypatch):
    release()
    monkeypatch.chdir(tmp_path.parent)
    snippets = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    found: dict = {}
    for snippet in snippets:
        exec(snippet, found)
    assert found["probabilities"].shape == (2, 2)
    assert len(found["captions"]) == 2


def test_where_first_weights_came_from_is_nobody_elses_business(release):
    secrets = ["model.init_from=/secret/run", "model.init_ema=true", "model.allow_missing=[secret.*]"]
    trained = release("clip_vision_model", "llama", secrets)
    for file in trained.folder.iterdir():
        assert b"secret" not in file.read_bytes(), file
    assert release_settings(trained.folder).decoder == trained.config.model.decoder  # and it still starts runs


def test_a_tokenizer_that_has_changed_since_training_is_not_released(release, tmp_path):
    trained, folder = release(), tmp_path / "again"
    folder.mkdir()
    assert "is another one than when the run was started" in trained.release(folder, trained.config, "what it was then")
    assert not (folder / "tokenizer.json").exists()


NO_ROOM = ["data.row_tokens=12", "model.vision.image_size=32", "model.vision.patch_dropout=0.6"]


def test_a_table_without_room_for_text_after_an_image_writes_nothing(release):
    model = (trained := release("clip_vision_model", "gpt2", NO_ROOM)).load()
    assert model.get_image_features(**trained.inputs).shape == (1, 32)
    with pytest.raises(RuntimeError, match="did not train the next token"):
        model.caption(**trained.inputs)


@pytest.mark.parametrize("known", [None, 7], ids=["there is none", "another one"])
def test_without_its_tokenizer_the_rest_is_released_and_says_so(release, tmp_path, known):
    trained, folder = release(), tmp_path / "again"
    folder.mkdir()
    if known is not None:
        words = Tokenizer(WordLevel({str(number): number for number in range(known)}, unk_token="0"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tokenizer")
    told = trained.release(folder, small_config(*trained.settings, f"data.tokenizer={tmp_path / 'tokenizer'}"))
    why = "another one: it has 7 tokens, the network has 448" if known else "no tokenizer at"
    assert "no tokenizer is released: " in told
    assert why in told
    assert not (folder / "tokenizer.json").exists()
    assert "AutoTokenizer" not in (folder / "README.md").read_text()


IN_TRANSFORMERS_4 = """
import sys, torch, transformers
from transformers import AutoModel, AutoTokenizer
folder, given = sys.argv[1], torch.load(sys.argv[2])
assert transformers.__version__.startswith("4."), transformers.__version__
model, loading = AutoModel.from_pretrained(folder, output_loading_info=True, trust_remote_code=True)
assert not any(loading.values()), loading
texts = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(given["text"], return_tensors="pt")
with torch.no_grad():
    torch.testing.assert_close(model.get_image_features(**given["inputs"]), given["image"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.get_text_features(**texts), given["context"], rtol=1e-4, atol=1e-5)
    logits = model(input_ids=given["ids"], **given["inputs"]).logits
    torch.testing.assert_close(logits, given["logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.caption(**given["inputs"], max_new_tokens=6, do_sample=False), given["caption"])
"""


@pytest.mark.skipif("TRANSFORMERS_4" not in os.environ, reason="TRANSFORMERS_4 names no folder with transformers 4.57")
@pytest.mark.parametrize("case", [*CASES, *OLDER_NAMES])
def test_transformers_4_computes_the_same(release, case, tmp_path):
    """``pip install --target FOLDER 'transformers==4.57.*'``, then ``TRANSFORMERS_4=FOLDER``."""
    trained = release(*(CASES | OLDER_NAMES)[case])
    model = trained.load()
    texts = AutoTokenizer.from_pretrained(trained.folder, trust_remote_code=True)(BEFORE, return_tensors="pt")
    with torch.no_grad():
        given = {
            "text": BEFORE,
            "inputs": trained.inputs,
            "ids": trained.ids[None],
            "image": model.get_image_features(**trained.inputs),
            "context": model.get_text_features(**texts),
            "logits": model(input_ids=trained.ids[None], **trained.inputs).logits,
            "caption": model.caption(**trained.inputs, max_new_tokens=6, do_sample=False),
        }
    torch.save(given, tmp_path / "given.pt")
    command = [sys.executable, "-c", IN_TRANSFORMERS_4, str(tmp_path), str(tmp_path / "given.pt")]
    environment = {**os.environ, "PYTHONPATH": os.environ["TRANSFORMERS_4"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


def test_positions_that_transformers_4_would_turn_otherwise_are_refused_there():
    by_kind = {kind: {"rope_type": "default", "rope_theta": 5.0} for kind in ("full_attention", "sliding_attention")}
    assert older_names({"model_type": "olmo3", "rope_parameters": by_kind}) == {"lcl_loads_in_version_4": False}
    assert older_names({"model_type": "gpt2"}) == {}


def test_its_processor_prepares_pictures_of_any_size(release):
    processor = AutoImageProcessor.from_pretrained(release().folder)
    inputs = processor(images=[np.zeros((30, 50, 3), np.uint8)], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_weights_may_have_fewer_bits_and_lie_in_several_files_and_the_temperature_stays_exact(release, tmp_path):
    trained = release(scale=0.1)
    folder = tmp_path / "half"
    folder.mkdir()
    trained.release(folder, trained.config, dtype="bf16", shard_size="50KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        assert torch.equal(model.logit_scale.log_scale, trained.model.logit_scale.log_scale)
    assert torch.equal(model.lm_head.weight, trained.model.lm_head.weight.bfloat16().float())
