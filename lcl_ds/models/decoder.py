"""Build the causal decoder: any transformers family that keeps packed documents apart, without its head."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from lcl_ds.models.attention.masks import LAYER_TYPES, Mode, attention_arguments, use_best_implementation

FINAL_NORMS = ("norm", "ln_f", "decoder.final_layer_norm")
"""Where the supported families keep the norm after their last block."""

TESTED_FAMILIES = ("llama", "gpt2", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt")
"""Families that the tests hold to keeping packed documents apart; any other is tried out when it is built."""
TRIED_LAYERS = 8
"""Of a decoder that is tried out: enough for the kinds of layers that families take turns with."""
POSITION_TABLES = ("wpe", "embed_positions")
"""What the supported families call a learned position table."""
DROPOUT_ENDINGS = ("dropout", "pdrop", "layerdrop", "dropout_prob", "drop_path_rate")
"""How transformers' configuration keys of dropout end."""


def build_decoder_config(model_type: str, hf_keys: dict[str, Any], vocab_size: int, max_positions: int) -> Any:
    """Make the transformers configuration of the decoder.

    Dropout is off unless the settings name it: families like GPT-2 switch it on by default, which hurts pre-training
    and makes losses depend on the number of ranks.

    Raises:
        ValueError: it has layers that mix packed documents, or is an OPT without a final norm of its own width.
    """
    defaults = AutoConfig.for_model(model_type, vocab_size=vocab_size, bos_token_id=None, eos_token_id=None)
    quiet = {key: 0.0 for key in defaults.to_dict() if key.endswith(DROPOUT_ENDINGS)}
    is_set = defaults.attribute_map.get("max_position_embeddings") in hf_keys  # GPT-2 calls it n_positions
    positions = {} if is_set else {"max_position_embeddings": max_positions}
    tokens = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    keys = {**quiet, **positions, **hf_keys, **tokens, "tie_word_embeddings": False}
    config = AutoConfig.for_model(model_type, **keys)
    _check_layers(config)
    return config


def _check_layers(config: Any) -> None:
    name = f"decoder {config.model_type}"
    mixing = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if mixing:
        kinds = ", ".join(sorted(mixing))
        raise ValueError(f"{name}: packed documents would see each other in its {kinds} layers; use llama or qwen3")
    if config.model_type == "opt" and not config.do_layer_norm_before:
        raise ValueError(f"{name}: do_layer_norm_before: false (OPT-350m) leaves no final norm; set it to true")
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise ValueError(f"{name}: word_embed_proj_dim must be hidden_size, the width in which images arrive")


def build_decoder(config: Any) -> tuple[PreTrainedModel, nn.Module]:
    """Build the blocks and, apart from them, the norm that follows.

    The final norm is taken out because two heads read the states before it, each through its own norm.

    Raises:
        ValueError: the final norm was not found.
    """
    model = AutoModel.from_config(config)
    modules = dict(model.named_modules())
    for name in FINAL_NORMS:
        if name in modules:
            model.set_submodule(name, nn.Identity())
            return model, modules[name]
    raise ValueError(f"decoder {config.model_type}: no final norm among {', '.join(FINAL_NORMS)}")


@torch.no_grad()
def check_isolation(config: Any, attention: str = "auto", mode: Mode = "causal") -> None:
    """Try two short documents in one row of a decoder of this configuration, unless its family is a tested one.

    Its first layers are tried, without the vocabulary, so that the memory for it does not grow with depth.

    Args:
        attention, mode: see :func:`lcl_ds.models.attention.masks.use_best_implementation`.

    Raises:
        ValueError: the second one depends on the first, or differs from what it is alone.
    """
    family = config.model_type
    if family in TESTED_FAMILIES:
        return
    others = f"use one of {', '.join(TESTED_FAMILIES)}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder, _ = build_decoder(_shallow(config))
        first, other, second = (torch.randn(1, 8, config.hidden_size) for _ in range(3))
    decoder.eval()
    use_best_implementation(decoder, attention, mode)
    try:
        ours, theirs, alone = (
            _states_of_last(decoder, documents) for documents in ([first, second], [other, second], [second])
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"decoder {family}: cannot read packed rows ({error}); {others}") from error
    # Not to the last bit: experts sum in an order that depends on the tokens of the row.
    if not all(torch.allclose(ours, same, rtol=1e-4, atol=1e-5) for same in (theirs, alone)):
        raise ValueError(f"decoder {family}: packed documents would see each other; {others}")


def check_positions(decoder: PreTrainedModel, document_tokens: int) -> None:
    """Refuse a learned position table that is shorter than the longest document. Raises: ValueError."""
    learned = any(name.endswith(POSITION_TABLES) for name, _ in decoder.named_modules())
    rows = decoder.config.max_position_embeddings
    if learned and rows < document_tokens:
        raise ValueError(
            f"decoder: its position table has {rows} rows, documents may have {document_tokens} tokens; "
            f"set data.document_tokens={rows} or leave the table's length out"
        )


def _shallow(config: Any) -> Any:
    """Copy a configuration with its first layers alone, and hardly a vocabulary."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = min(shallow.num_hidden_layers, TRIED_LAYERS)
    if isinstance(getattr(shallow, "layer_types", None), list):
        shallow.layer_types = shallow.layer_types[:TRIED_LAYERS]
    shallow.vocab_size, shallow.pad_token_id = 1, None
    return shallow


def _states_of_last(decoder: PreTrainedModel, documents: list[torch.Tensor]) -> torch.Tensor:
    embeddings = torch.cat(documents, 1)
    position_ids = torch.cat([torch.arange(document.shape[1])[None] for document in documents], 1)
    arguments = attention_arguments(decoder, embeddings, position_ids)
    states = decoder(inputs_embeds=embeddings, use_cache=False, **arguments).last_hidden_state
    return states[:, -documents[-1].shape[1] :]
