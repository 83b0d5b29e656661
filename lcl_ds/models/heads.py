"""Read the decoder's states: language-model loss, context feature, temperature."""

import math

import torch
from lcl_kernels import linear_cross_entropy
from torch import Tensor, nn


class LMHead(nn.Module):
    """Norm and vocabulary projection, fused with the loss so that logits never exist as a whole.

    The module owns the weight and runs the loss in its forward, so ZeRO-3's hooks gather the weight for it.

    Args:
        softcap: bound of the logits, in families like Gemma 2; None: unbounded.
    """

    def __init__(
        self, norm: nn.Module, hidden_size: int, vocab_size: int, std: float = 0.02, softcap: float | None = None
    ):
        super().__init__()
        self.norm = norm
        self.softcap = softcap
        self.std = std
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projection anew."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, hidden_states: Tensor, labels: Tensor, normalizer: Tensor | float) -> Tensor:
        """Sum the next-token losses of [T, H], [T] / ``normalizer``: an fp32 scalar, 0 and connected for T = 0."""
        states = self.norm(hidden_states)
        return linear_cross_entropy(
            states, self.weight, labels, softcap=self.softcap, normalizer=normalizer, counted_rows=len(labels)
        )


class ContextHead(nn.Module):
    """Norm and projection of what the preceding context expects of an image, read at ``<soi>``."""

    def __init__(self, norm: nn.Module, hidden_size: int, embed_dim: int):
        super().__init__()
        self.norm = norm
        self.proj = nn.Linear(hidden_size, embed_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projection anew."""
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Turn states [P, H] into features [P, embed_dim]."""
        return self.proj(self.norm(hidden_states))


class ExactScalar(nn.Module):
    """A learned number that stays exact where weights are rounded to bf16.

    Near 2.66 bf16 has steps of 0.016, so a temperature would stand still for hundreds of steps and then jump. What
    rounding took away is kept beside the weight and added back; gradients reach the weight as usual.
    """

    rounded_off: Tensor
    """fp32 [1], the exact value less the weight; 0 where the weight is fp32. Computed from the optimizer's fp32
    weights, so no checkpoint holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rounded_off", torch.zeros(1), persistent=False)

    @property
    def weight(self) -> nn.Parameter:
        """Return the one weight, [1]."""
        (weight,) = self.parameters()
        return weight

    def value(self) -> Tensor:
        """Return the exact value, fp32 [1]."""
        return self.weight.float() + self.rounded_off

    def remember(self, exact: Tensor) -> None:
        """Note the exact value of a weight that is its rounding."""
        self.rounded_off = (exact.float() - exact.to(self.weight.dtype).float()).view(1)


class LogitBias(ExactScalar):
    """The learned number that is added to similarities before the sigmoid; shape [1] for the same reason as below."""

    def __init__(self, init: float):
        super().__init__()
        self.init = init
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Go back to the first value."""
        nn.init.constant_(self.bias, self.init)

    def forward(self) -> Tensor:
        """Return the bias, fp32 [1]."""
        return self.value()


class LogitScale(ExactScalar):
    """The learned temperature multiplier, kept as its logarithm; shape [1] because DeepSpeed refuses 0-d weights."""

    def __init__(self, init: float):
        super().__init__()
        self.init = init
        self.log_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Go back to the first multiplier."""
        nn.init.constant_(self.log_scale, math.log(self.init))

    def forward(self) -> Tensor:
        """Return the multiplier, fp32 [1]."""
        return self.value().exp()
