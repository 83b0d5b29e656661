"""The sigmoid loss over the pairs of all ranks (SigLIP), without the [M, M] similarities.

Every pair of an x and a y is a question of its own: do they belong together? So nothing has to be known of a row or
column before its gradient, and one pass does it all: a rank takes its own x against the y of every rank, block by
block; a block gives its losses, the gradient of the own x and a part of the gradient of these y, which goes home to
their owner. All of that happens in forward: backward only multiplies by the upstream gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lcl_kernels import torch_sigmoid_contrastive
from lcl_kernels._common import (
    Backend,
    compute_dtype,
    operand_dtype,
    resolve_workspace,
    separate_rows,
    use_triton,
    wants_gradients,
)
from lcl_kernels.exchange import Exchange, FeatureBlocks, GradientReturn, group_name, meet
from lcl_kernels.pairs import check_pairs, define_operators, kept, operator_of
from lcl_kernels.sigmoid_negatives import Block, BlockFunction, gradient_unit


def sigmoid_contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    counts: Sequence[int] | None = None,
    exchange: Exchange = "auto",
    backend: Backend = "auto",
    workspace_mb: float | None = None,
) -> Tensor:
    """This rank's share of the sigmoid loss over the pairs of all ranks (SigLIP, arXiv 2303.15343).

    Pair i is x_i, y_i. With z_ij = logit_scale * x_i . y_j + logit_bias over all M pairs, the loss of x_i is
    l_i = -log sigmoid(z_ii) - sum_{j != i} log sigmoid(-z_ij), and the share is sum(l_i over own pairs) / M: the SUM of
    the shares over ranks is the mean over all pairs.

    - The gradients of x and y are those of the sum of the shares, with the role of the local y as negatives on other
      ranks included. No reduction of feature gradients between ranks is needed or wanted.
    - The gradients of logit_scale and logit_bias are parts of that of the sum: the sums over ranks are the whole.

    The upstream gradient has to be the same number on all ranks. Data parallel wrappers that average parameter
    gradients over W ranks give 1/W of the gradient of the sum: scale the loss by W to undo it.

    Args:
        x, y: [m, D], same dtype (float32, bfloat16, float16 or float64), taken as they are: L2-normalise before.
            m may differ between ranks and be 0.
        logit_scale, logit_bias: the multiplier itself (not its logarithm) and what is added, tensors of one element of
            any float dtype. The paper starts at 10 and -10.
        group, counts, exchange, backend, workspace_mb: as in `contrastive_loss`.

    Returns:
        A scalar in float32 (float64 for float64 features); 0, attached to the graph, on a rank without pairs.
        Gradients have the dtype of their inputs. The same inputs on the same ranks give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, here or between ranks; a DTensor; an unusable option.
        RuntimeError: backend "triton" where it cannot run; differentiating twice, forward or by torch.func.

    Every rank of the group has to call it, with the same options.
    """
    check_pairs(x, y, exchange, logit_scale=logit_scale, logit_bias=logit_bias)
    loss, *_ = operator_of("sigmoid_contrastive", group, counts)(
        x,
        y,
        logit_scale,
        logit_bias,
        group_name(group),
        counts,
        exchange,
        use_triton(backend, x),
        resolve_workspace(workspace_mb, x),
        *wants_gradients(x, y, logit_scale, logit_bias),
    )
    return loss


def _sigmoid_contrastive(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    group_name: str,
    counts: Sequence[int] | None,
    exchange: str,
    triton: bool,
    workspace_mb: float,
    want_x: bool,
    want_y: bool,
    want_scale: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, d_x, d_y, d_scale, d_bias), the gradients in the compute dtype and empty where not wanted."""
    module = importlib.import_module("lcl_kernels.triton_sigmoid_contrastive") if triton else torch_sigmoid_contrastive
    backend = cast(BlockFunction, module)
    wanted = [want_x, want_y, want_scale, want_bias]
    ranks = meet(
        x,
        group_name,
        "sigmoid_contrastive_loss",
        {},
        exchange=exchange,
        counts=counts,
        wants_gradients=any(wanted),
    )
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        scale, bias = (t.to(compute_dtype(x.dtype)).reshape(()) for t in (logit_scale, logit_bias))
        left, right = (separate_rows(t.to(operand_dtype(t)).contiguous()) for t in (x, y))
        # The positives, in full precision; everything else is added to them.
        cosine = (x.to(scale.dtype) * y.to(scale.dtype)).sum(1)
        z = torch.addcmul(bias, cosine, scale)
        pull = torch.sigmoid(-z)
        sums = -torch.stack([F.logsigmoid(z), pull, pull * cosine]).sum(1)
        weight = -gradient_unit(left) * pull.unsqueeze(1)
        d_x = weight * right if want_x else None
        sends = ranks.wants_gradients and (want_y or ranks.world_size > 1)
        home = GradientReturn(ranks, weight * left) if sends else None
        for owner, features in FeatureBlocks(right, ranks).walk(home):
            made = backend.negatives(
                Block(left, features, scale, bias, owner == ranks.rank),
                gradients=ranks.wants_gradients,
                d_x=d_x,
                want_y=sends,
                workspace_mb=workspace_mb,
            )
            sums = sums + made.sums
            if home is not None and made.d_y is not None:
                home.send(owner, made.d_y)
        factor = scale / (gradient_unit(left) * max(1, ranks.total))
        d_y = home.finish() if home is not None else None
        for gradient in (d_x, d_y):
            if gradient is not None:
                gradient.mul_(factor)
        loss, d_bias, d_scale = (total / max(1, ranks.total) for total in sums)
    return loss, *kept([d_x, d_y, d_scale, d_bias], wanted, [x, y, logit_scale, logit_bias])


define_operators("sigmoid_contrastive", _sigmoid_contrastive, 4)
