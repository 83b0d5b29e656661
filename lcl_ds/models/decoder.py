"""The causal decoder: any transformers family that keeps packed documents apart, without its head."""

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

FINAL_NORMS = ("norm", "ln_f")
"""Where the supported families keep the norm after their last block."""

DROPOUT_ENDINGS = ("dropout", "pdrop", "layerdrop", "dropout_prob", "drop_path_rate")
"""How transformers' configuration keys of dropout end."""

LEAKING_FAMILIES = {
    "opt": "OPT takes positions from the attention mask, so packed documents would see each other",
}


def build_decoder_config(model_type: str, hf_keys: dict[str, Any], vocab_size: int, max_positions: int) -> Any:
    """A transformers configuration of the decoder.

    Dropout is off unless the settings name it: families like GPT-2 switch it on by default, which hurts pre-training
    and makes losses depend on the number of ranks.

    Raises:
        ValueError: the family cannot keep packed documents apart.
    """
    if model_type in LEAKING_FAMILIES:
        raise ValueError(f"decoder {model_type}: {LEAKING_FAMILIES[model_type]}; use llama, gpt2 or qwen3")
    defaults = AutoConfig.for_model(model_type, vocab_size=vocab_size, bos_token_id=None, eos_token_id=None)
    quiet = {key: 0.0 for key in defaults.to_dict() if key.endswith(DROPOUT_ENDINGS)}
    positions = {"max_position_embeddings": max_positions}
    tokens = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return AutoConfig.for_model(model_type, **{**quiet, **positions, **hf_keys, **tokens, "tie_word_embeddings": False})


def build_decoder(config: Any) -> tuple[PreTrainedModel, nn.Module]:
    """The blocks and, apart, the norm that follows them.

    The final norm is taken out because two heads read the states before it, each through a norm of its own.

    Raises:
        ValueError: the final norm was not found.
    """
    model = AutoModel.from_config(config)
    for name in FINAL_NORMS:
        if isinstance(getattr(model, name, None), nn.Module):
            norm = getattr(model, name)
            setattr(model, name, nn.Identity())
            return model, norm
    raise ValueError(f"decoder {config.model_type}: no final norm among {', '.join(FINAL_NORMS)}")
