"""Plain torch in place of the attention kernels that need a GPU, under transformers' own code for them."""

import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import masking_utils, modeling_flash_attention_utils
from transformers.integrations import flash_attention as flash_integration
from transformers.integrations import flex_attention as flex_integration

from lcl_ds.models.attention import masks as attention


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """What flash-attn documents: sequences laid end to end [T, heads, D], windows inclusive, -1 for unbounded."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = cu_seqlens_q.diff()
    assert (cu_seqlens_q[0], cu_seqlens_q[-1]) == (0, len(q))
    assert max_seqlen_q == max_seqlen_k == lengths.max()
    assert dropout_p == 0
    documents = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        query, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * (softmax_scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left, right = window_size[0], 0 if causal else window_size[1]
        hidden = ((behind > left) & (left >= 0)) | ((-behind > right) & (right >= 0))
        documents.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(documents)


def flex_attention(query, key, value, *, score_mod, block_mask, scale, training, enable_gqa, **options):
    """What torch documents, with the rule of the block mask for every pair of positions."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = score_mod(query @ key.transpose(2, 3) * scale, None, None, None, None)
    sizes = [torch.arange(size) for size in scores.shape]
    batch, head, q, kv = torch.meshgrid(*sizes, indexing="ij")
    return scores.masked_fill(~block_mask.mask_mod(batch, head, q, kv), -torch.inf).softmax(-1) @ value


def use_plain_kernels(monkeypatch) -> None:
    """Let flash and flex run anywhere: their lowest call in plain torch, everything above it as it is."""
    kernels = None, flash_attn_varlen_func, None, None, None
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *args, **kwargs: kernels)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)

    # Which half precision an fp32 query should have: none, here where the whole model is fp32.
    monkeypatch.setattr(flash_integration, "get_target_dtype", lambda *args: None)

    def uncompiled_mask(*args, _compile, **options):
        return create_block_mask(*args, **options)

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", flex_attention)
    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled_mask)
    monkeypatch.setattr(attention, "unavailable", lambda *args: None)
    # transformers refuses flash on a machine without its package.
    monkeypatch.setattr(
        attention, "switch_implementation", lambda tower, name: setattr(tower.config, "_attn_implementation", name)
    )
