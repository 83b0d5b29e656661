"""Who sees whom in a packed row, for every decoder family and every attention implementation.

Flash and flex run as transformers calls them, but for their kernels: see tests/attention_kernels.py.
"""

import itertools
from functools import cache
from typing import Any

import pytest
import torch

from lcl_ds.errors import UserError
from lcl_ds.models import decoder
from lcl_ds.models.attention import masks as attention
from lcl_ds.models.attention.masks import attention_arguments, choose_implementation, image_blocks
from lcl_ds.models.build import check_attention_here
from lcl_ds.models.decoder import TESTED_FAMILIES, build_decoder_config, check_isolation
from lcl_ds.objectives.base import local_normalizers
from tests.support.attention_kernels import use_plain_kernels
from tests.support.small import (
    DECODERS,
    IMAGE_TOKENS,
    ROW_TOKENS,
    batch_of,
    batch_with_images,
    batch_without_images,
    lcl_objective,
    sequence,
    small_config,
    small_model,
)

WINDOW = 5
WINDOWED = {  # families whose layers look back a limited way, here a short one
    "mistral": [f"model.decoder.sliding_window={WINDOW}"],
    "qwen2": [
        f"model.decoder.sliding_window={WINDOW}",
        "model.decoder.use_sliding_window=true",
        "model.decoder.max_window_layers=1",
    ],
    "gemma2": [f"model.decoder.sliding_window={WINDOW}"],
    "gemma3_text": [
        f"model.decoder.sliding_window={WINDOW}",
        "model.decoder.layer_types=[sliding_attention, full_attention]",
    ],
}
VARIANTS = [*((family, ()) for family in DECODERS), *((family, keys) for family, keys in WINDOWED.items())]
IMPLEMENTATIONS = ["eager", "sdpa", "varlen", "flash_attention_2", "flex_attention"]
CANNOT = {("gemma2", "sdpa"), ("gemma2", "varlen"), ("gpt2", "flex_attention")}


def name_of(value):
    return value if isinstance(value, str) else "window" if value else "plain"


each_variant = pytest.mark.parametrize(("family", "keys"), VARIANTS, ids=name_of)
each_implementation = pytest.mark.parametrize(
    ("family", "keys", "implementation"),
    [(*variant, name) for variant in VARIANTS for name in IMPLEMENTATIONS if (variant[0], name) not in CANNOT],
    ids=name_of,
)


@pytest.fixture
def plain_kernels(monkeypatch):
    use_plain_kernels(monkeypatch)


def model_of(family, keys=(), implementation="auto", *more):
    return small_model(small_config(f"model.decoder.attention={implementation}", *keys, *more, decoder=family)).eval()


def use_mode(model, mode):
    model.attention_mode = mode
    model.choose_attention()


def states(model, batch):
    with torch.no_grad():
        return model(batch)[0].view(*batch.input_ids.shape, -1)


# --- packed documents -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain_kernels")
@each_implementation
def test_a_document_does_not_change_a_bit_of_its_neighbour(family, keys, implementation):
    second = sequence(["xyz", 0, "w"], seed=9)
    first, other = sequence(["abc", 0, "de"], seed=1), sequence(["qrs", 0, "tu"], seed=2)
    length = len(first.tokens.input_ids)
    model = model_of(family, keys, implementation)
    for mode in ("causal", "images", "bidirectional"):
        use_mode(model, mode)
        ours, theirs = (states(model, batch_of([document, second]))[0] for document in (first, other))
        assert not torch.equal(ours[:length], theirs[:length])
        assert torch.equal(ours[length:], theirs[length:])


@each_variant
def test_the_loss_of_packed_rows_is_that_of_padded_ones(family, keys):
    documents = [sequence(["abc", 0, "de"], seed=1), sequence(["xyz", 0], seed=2), sequence([0, "fg", 1, "h"], seed=3)]
    objective = lcl_objective(model_of(family, keys)).double()

    def losses(batch):
        with torch.no_grad():
            return objective(batch, *local_normalizers(objective, batch))

    packed, padded = losses(batch_of(documents)), losses(batch_of(*([document] for document in documents)))
    for name in ("loss", "generation_loss", "contrastive_loss"):
        assert packed[name].item() == pytest.approx(padded[name].item(), rel=1e-6), name


def state_and_gradient(model, mode):
    model.zero_grad()
    use_mode(model, mode)
    hidden, _ = model(batch_with_images())
    hidden.square().mean().backward()
    return hidden.detach(), model.pooling.proj.weight.grad


@cache
def eager_states_and_gradients(family, keys):
    model = model_of(family, keys, "eager")
    return {mode: state_and_gradient(model, mode) for mode in ("causal", "images", "bidirectional")}


@pytest.mark.usefixtures("plain_kernels")
@each_implementation
def test_implementations_agree_in_states_and_gradients(family, keys, implementation):
    model = model_of(family, keys, implementation)
    for mode, expected in eager_states_and_gradients(family, tuple(keys)).items():
        actual = state_and_gradient(model, mode)
        wanted = attention.choose_implementation(model.decoder, implementation, mode, "cpu", torch.float32)
        assert model.decoder.config._attn_implementation == wanted
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bounds_of_documents_are_those_of_rows_laid_end_to_end():
    long, short = sequence(["abc", 0, "de"], seed=1), sequence(["xyz"], seed=2)
    batch = batch_of([long, short], [short])
    first, second = len(long.tokens.input_ids), len(short.tokens.input_ids)
    # Padding is cut into documents as long as the longest of its row.
    starts = [0, first, *range(first + second, ROW_TOKENS, first)]
    starts += [*range(ROW_TOKENS, 2 * ROW_TOKENS, second), 2 * ROW_TOKENS]
    assert batch.cu_seqlens.tolist() == starts
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == first


# --- what a token sees ------------------------------------------------------------------------------------------------

LENGTHS = (13, 11)
BLOCKS = [-1] * 3 + [0] * 4 + [-1] * 9 + [1] * 4 + [2] * 3 + [-1]
ONE_LAYER = {
    **{family: ([], None) for family in ("llama", "gpt2", "opt", "qwen3", "gemma")},
    "mistral": (WINDOWED["mistral"], WINDOW),
    "qwen2": ([*WINDOWED["qwen2"][:2], "model.decoder.max_window_layers=0"], WINDOW),
    "gemma2": (WINDOWED["gemma2"], WINDOW),
    "gemma3_text": ([*WINDOWED["gemma3_text"][:1], "model.decoder.layer_types=[sliding_attention]"], WINDOW),
}


def sees(query, key, mode, window):
    """The rule, token by token."""
    document = [0] * LENGTHS[0] + [1] * LENGTHS[1]
    if document[query] != document[key]:
        return False
    if mode == "images" and BLOCKS[query] == BLOCKS[key] >= 0:
        return True
    if mode != "bidirectional" and key > query:
        return False
    return window is None or abs(query - key) < window


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("mode", ["causal", "images", "bidirectional"])
@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, name) for family in ONE_LAYER for name in IMPLEMENTATIONS if (family, name) not in CANNOT],
)
def test_a_layer_reads_exactly_what_its_tokens_may_see(family, implementation, mode):
    keys, window = ONE_LAYER[family]
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = model_of(family, keys, implementation, f"model.decoder.{layers}=1")
    use_mode(model, mode)
    total = sum(LENGTHS)
    embeddings = torch.randn(1, total, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    arguments = attention_arguments(
        model.decoder,
        embeddings,
        torch.cat([torch.arange(length) for length in LENGTHS])[None],
        mode=mode,
        image_blocks=torch.tensor([BLOCKS]),
        cu_seqlens=torch.tensor([0, LENGTHS[0], total], dtype=torch.int32),
        max_seqlen=max(LENGTHS),
    )
    output = model.decoder(inputs_embeds=embeddings, use_cache=False, **arguments).last_hidden_state[0]
    weights = torch.randn(32, generator=torch.Generator().manual_seed(1))
    read = [torch.autograd.grad(state @ weights, embeddings, retain_graph=True)[0][0].any(-1) for state in output]
    expected = [[sees(query, key, mode, window) for key in range(total)] for query in range(total)]
    assert torch.stack(read).tolist() == expected


def test_images_both_ways_is_a_setting():
    document = sequence(["abc", 0, "de"])
    start = document.tokens.slots[0].position
    as_published, both_ways = (
        states(model_of("llama", (), "sdpa", f"model.decoder.bidirectional_images={value}"), batch_of([document]))[0]
        for value in ("false", "true")
    )
    assert torch.equal(as_published[:start], both_ways[:start])
    changed = (as_published != both_ways).any(-1)
    assert changed[start : start + IMAGE_TOKENS - 1].all()


def blocks_of(batch):
    places = (batch.slot_positions[:, None] + torch.arange(IMAGE_TOKENS)).flatten()
    return image_blocks(batch.position_ids, places, torch.arange(len(places)) // IMAGE_TOKENS, IMAGE_TOKENS)


def test_blocks_number_the_images_and_leave_the_constant_one_out():
    batch = batch_with_images()
    blocks = blocks_of(batch)
    for number, position in enumerate(batch.slot_positions.tolist()):
        assert (blocks.flatten() == number).nonzero().flatten().tolist() == [*range(position, position + IMAGE_TOKENS)]
    assert (blocks >= 0).sum() == batch.image_count * IMAGE_TOKENS
    without = batch_without_images()
    assert (blocks_of(without) == -1).all()


# --- which implementation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("installed", [(), (2,), (2, 3)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_auto_takes_the_best_that_can_run(family, installed, monkeypatch):
    for version in (2, 3):
        name = f"is_flash_attn_{version}_available"
        monkeypatch.setattr(attention, name, lambda version=version: version in installed)
    tower = small_model(small_config(decoder=family)).decoder

    def choice(device, dtype, mode="causal"):
        return choose_implementation(tower, "auto", mode, device, dtype)

    on_cpu = "eager" if family == "gemma2" else "varlen"
    with_masks = "sdpa" if family == "gpt2" else "flex_attention"
    without_flash = with_masks if family == "gemma2" else "varlen"
    assert choice("cpu", torch.float32) == choice("cpu", torch.bfloat16) == on_cpu
    assert choice("cpu", torch.float32, "images") == ("eager" if family == "gemma2" else "sdpa")
    assert choice("cuda", torch.bfloat16) == (f"flash_attention_{max(installed)}" if installed else without_flash)
    assert choice("cuda", torch.float32) == with_masks
    assert choice("cuda", torch.bfloat16, "images") == with_masks


def test_a_model_trained_with_flash_is_read_without_a_gpu():
    model = model_of("llama", (), "flash_attention_2", "model.vision.attention=flash_attention_2")
    assert states(model, batch_with_images()).isfinite().all()
    assert model.decoder.config._attn_implementation == "varlen"
    assert model.vision.model.config._attn_implementation == "sdpa"


def test_attention_is_chosen_when_the_network_is_built_moved_or_cast_and_at_no_other_time(monkeypatch):
    chosen = []
    choose = attention.choose_implementation

    def watched(tower, wanted, mode, device, dtype, *preferred):
        chosen.append((type(tower).__name__, device, dtype))
        return choose(tower, wanted, mode, device, dtype, *preferred)

    monkeypatch.setattr(attention, "choose_implementation", watched)
    model = model_of("llama")
    towers = {type(model.decoder).__name__, type(model.vision.model).__name__}
    assert {*chosen} == {(tower, device, torch.float32) for tower in towers for device in ("meta", "cpu")}
    chosen.clear()
    states(model, batch_with_images())
    assert chosen == []
    lcl_objective(model).to(dtype=torch.bfloat16)
    assert {*chosen} == {(tower, "cpu", torch.bfloat16) for tower in towers}
    chosen.clear()
    model.to("meta")
    assert {*chosen} == {(tower, "meta", torch.bfloat16) for tower in towers}


def test_a_mode_that_the_chosen_implementation_lacks_is_not_computed_wrongly():
    model, batch = model_of("llama"), batch_with_images()
    _, tokens = model.encode_images(batch.images, batch.image_seeds)
    with pytest.raises(AssertionError, match="varlen cannot let tokens of an image see each other"):
        model.decode(batch, tokens.index_select(0, batch.slot_images), "images")


def test_the_vision_tower_follows_its_setting():
    states_of = [
        states(model_of("llama", (), "auto", f"model.vision.attention={name}"), batch_with_images())
        for name in ("eager", "auto")
    ]
    torch.testing.assert_close(*states_of, rtol=1e-5, atol=1e-6)
    model = model_of("llama", (), "auto", "model.vision.attention=eager")
    states(model, batch_with_images())
    assert model.vision.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("gemma2", ["attention=sdpa"], "model.decoder.attention: sdpa: it cannot cap attention logits as gemma2 does"),
        ("gpt2", ["attention=flex_attention"], "flex_attention: transformers does not support it for gpt2"),
        ("llama", ["attention=flex_attention", "attention_dropout=0.1"], "flex_attention: it has no attention dropout"),
        ("llama", ["attention=flash_attention_2", "bidirectional_images=true"], "see each other"),
        ("opt", ["do_layer_norm_before=false"], r"do_layer_norm_before: false \(OPT-350m\) leaves no final norm"),
        ("opt", ["word_embed_proj_dim=16"], "word_embed_proj_dim must be hidden_size"),
        ("qwen3", ["layer_types=[full_attention, linear_attention]"], "linear_attention layers"),
    ],
)
def test_what_cannot_work_is_refused_when_the_model_is_built(family, overrides, message):
    config = small_config(*(f"model.decoder.{override}" for override in overrides), decoder=family)
    with pytest.raises(UserError, match=message):
        small_model(config)


@pytest.mark.parametrize(
    ("override", "precision", "message"),
    [
        ("decoder.attention=flash_attention_2", "bf16", "it needs a GPU and the flash-attn package; use auto"),
        ("decoder.attention=flash_attention_3", "fp32", "it needs precision bf16"),
        ("vision.attention=flash_attention_2", "fp32", "model.vision.attention: flash_attention_2: it needs precision"),
        ("decoder.attention=flex_attention", "fp32", "it needs a GPU to train"),
    ],
)
def test_what_this_machine_lacks_is_refused_before_training(override, precision, message):
    settings = small_config(f"model.{override}").model
    with pytest.raises(UserError, match=message):
        check_attention_here(settings, "cpu", precision)
    check_attention_here(small_config().model, "cpu", precision)


def test_an_unknown_family_is_tried_out(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    olmo = build_decoder_config("olmo2", sizes, 100, 64)
    assert "olmo2" not in TESTED_FAMILIES
    check_isolation(olmo)
    bloom = build_decoder_config("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, 100, 64)
    with pytest.raises(ValueError, match="decoder bloom: cannot read packed rows"):
        check_isolation(bloom)
    deep = build_decoder_config("olmo3", sizes | {"num_hidden_layers": 40}, 100_000, 64)
    built: list[Any] = []
    build = decoder.build_decoder
    monkeypatch.setattr(decoder, "build_decoder", lambda config: built.append(config) or build(config))
    check_isolation(deep)
    assert (built[0].num_hidden_layers, built[0].vocab_size, len(built[0].layer_types)) == (8, 1, 8)
    assert (deep.num_hidden_layers, deep.vocab_size, len(deep.layer_types)) == (40, 100_000, 40)
    monkeypatch.setattr(decoder, "attention_arguments", lambda *args: {})
    with pytest.raises(ValueError, match="decoder olmo2: packed documents would see each other"):
        check_isolation(olmo, "sdpa")


def test_every_family_that_is_taken_for_tested_is_tested():
    assert set(TESTED_FAMILIES) == set(DECODERS)
    assert {family for family, _ in itertools.chain(VARIANTS)} == set(DECODERS) == set(ONE_LAYER)
