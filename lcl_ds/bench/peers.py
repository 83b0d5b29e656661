"""The losses that are compared: each adapter names what it needs and gives a function of the inputs.

Linear cross entropy takes (hidden [N, H], weight [V, H], labels [N]), with -100 at labels that are ignored, as a
training loop has them. The contrastive losses take (x [M, D], y [M, D], scale []), L2-normalised rows and the
multiplier of the logits, the sigmoid losses their bias [] too. All return the mean loss as a scalar.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]
IGNORED = -100
OURS, EAGER = "lcl_kernels", "eager"
COUNTED = "lcl_kernels counted"
"""Ours where the caller says how many labels count, as the trainer does: nothing then waits for the device."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUACK_CHUNK = 4096
"""Rows per chunk, QuACK's own default; without a number its module runs F.linear and a loss kernel."""


class UnavailableError(Exception):
    """A method cannot run here; the message is the reason in a short phrase."""


@dataclass(frozen=True)
class Setting:
    """What is computed, and where; small, so that it can be sent to another process."""

    shape: tuple[int, ...]
    """(N, H, V) of linear cross entropy or (M, D) of the others."""
    dtype_name: str
    device_name: str
    seed: int = 0
    workspace_mb: float | None = None
    """Option of lcl_kernels; None: its own choice."""
    scale: float = 1.0
    """Multiplier of contrastive logits."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)


@dataclass(frozen=True)
class Method:
    """One way to compute a loss."""

    name: str
    build: Callable[[Setting], Loss]
    """Imports what it needs; raises UnavailableError."""
    gpu_only: bool = False
    compiles: bool = False
    """The first call compiles in this process, which takes memory that later calls do not."""
    waits: bool = False
    """A call waits for the device, so no CUDA graph can hold it."""

    def function(self, setting: Setting) -> Loss:
        """The loss for inputs of this shape.

        Raises:
            UnavailableError: it cannot run on this device or shape, or is not installed.
        """
        if self.gpu_only and setting.device.type != "cuda":
            raise UnavailableError("needs a GPU")
        return self.build(setting)


def _import(module: str, package: str) -> Any:
    """The module of a peer."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        reason = "not installed" if error.name == top else f"not installed: {error.name}, which {package} needs"
        raise UnavailableError(reason) from error
    except Exception as error:  # a peer may fail at import for the lack of a GPU, a driver or a compiler
        raise UnavailableError(f"import of {module} fails: {type(error).__name__}: {error}"[:120]) from error


def _workspace(setting: Setting) -> dict[str, float]:
    return {} if setting.workspace_mb is None else {"workspace_mb": setting.workspace_mb}


_compiled_for: list[tuple[int, ...]] = []


def _compile(function: Loss, setting: Setting) -> Loss:
    """`function` compiled for exactly this shape; what was compiled for other shapes is forgotten."""
    if _compiled_for != [setting.shape]:
        torch.compiler.reset()  # too many shapes of one function would end in eager execution without a word
        _compiled_for[:] = [setting.shape]
    return torch.compile(function, dynamic=False)


# --- linear cross entropy -----------------------------------------------------------------------------------------


def _our_losses(setting: Setting, backend: Any = "auto") -> Loss:
    from lcl_kernels import linear_cross_entropy

    options = {"ignore_index": IGNORED, "backend": backend, **_workspace(setting)}
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, **options)


def _our_counted_losses(setting: Setting) -> Loss:
    from lcl_kernels import linear_cross_entropy

    options: dict[str, Any] = {"ignore_index": IGNORED, **_workspace(setting)}
    known: dict[tuple[int, int], int] = {}

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        key = labels.data_ptr(), len(labels)
        if key not in known:  # in the first call, which is for warm-up
            known[key] = int((labels != IGNORED).sum())
        value: Tensor = linear_cross_entropy(hidden, weight, labels, counted_rows=known[key], **options)
        return value

    return loss


def eager_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits in the dtype of the inputs, the loss in float32, as autocast has it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORED)


def _torch_chunked(_: Setting) -> Loss:
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy")
    chunked = options()  # torch's own choice of chunks and of the dtype of sums
    return lambda hidden, weight, labels: function(hidden, weight, labels, ignore_index=IGNORED, options=chunked)


def _liger(_: Setting) -> Loss:
    module = _import("liger_kernel.transformers.fused_linear_cross_entropy", "liger-kernel")
    loss = module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def _liger_sm90(setting: Setting) -> Loss:
    rows, _, vocabulary = setting.shape
    module = _import("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90", "liger-kernel")
    if setting.dtype != torch.bfloat16:
        raise UnavailableError("bfloat16 only")
    if rows % 128 or vocabulary % 256:
        raise UnavailableError("shape: N must be a multiple of 128, V of 256")
    function = module.LigerFusedLinearCrossEntropySM90Function.apply
    return lambda hidden, weight, labels: function(hidden, weight, labels, IGNORED)


def _cut_cross_entropy(setting: Setting) -> Loss:
    function = _import("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    if setting.dtype == torch.float32:
        raise UnavailableError("no float32")
    return lambda hidden, weight, labels: function(hidden, weight, labels, ignore_index=IGNORED)


def _quack(setting: Setting) -> Loss:
    rows, width, vocabulary = setting.shape
    function = _import("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
    if rows % 8 or width % 8 or vocabulary % 8:
        raise UnavailableError("shape: N, H and V must be multiples of 8")
    return lambda hidden, weight, labels: function(hidden, weight, labels, chunk_size=QUACK_CHUNK, ignore_index=IGNORED)


# --- contrastive ----------------------------------------------------------------------------------------------------


def _our_contrastive(setting: Setting, backend: Any = "auto") -> Loss:
    from lcl_kernels import contrastive_loss

    options = {"backend": backend, **_workspace(setting)}
    return lambda x, y, scale: contrastive_loss(x, y, scale, **options)


def eager_contrastive(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """One [M, M] matrix in the dtype of the features, both losses in float32."""
    logits = (scale * (x @ y.T)).float()
    pairs = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def _open_clip(setting: Setting) -> Loss:
    return _under_autocast(_open_clip_losses().ClipLoss(), setting)


def _open_clip_losses() -> Any:
    """The module of open_clip's losses."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise UnavailableError("not installed")
    # The file by itself: it needs torch alone, while the package imports image and text models.
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _under_autocast(loss: Loss, setting: Setting) -> Loss:
    """As open_clip's training loop calls its losses."""
    half = setting.dtype in (torch.bfloat16, torch.float16)

    def function(*inputs: Tensor) -> Tensor:
        with torch.autocast(setting.device.type, dtype=setting.dtype if half else torch.bfloat16, enabled=half):
            return loss(*inputs)

    return function


def _memeff(setting: Setting) -> Loss:
    loss_class = _import("memeff", "memeff").MemoryEfficientCLIPLoss
    width = setting.shape[1]
    if width < 16 or (width < 64 and width & (width - 1)):
        raise UnavailableError("shape: D below 64 must be a power of two, 16 at least")
    # stable=True, its default, multiplies gradients by another factor. The temperature is a number: it does not learn.
    loss = loss_class(temperature=1 / setting.scale, normalized_inputs=True, stable=False)
    return lambda x, y, scale: loss(x, y)


def _inf_cl(setting: Setting) -> Loss:
    width = setting.shape[1]
    part = next((part for part in (256, 128, 64, 32, 16) if width % part == 0), None)
    # Its kernels on one device; the ring around them needs a process group even for one rank.
    function = _import("inf_cl.flash", "inf-cl").cal_flash_loss
    if part is None:
        raise UnavailableError("shape: D must be a multiple of 16")
    options = {"head_dim": part}

    def both(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        forth, back = function(x, y, scale=scale, **options), function(y, x, scale=scale, **options)
        return (forth.mean() + back.mean()) / 2

    return both


# --- sigmoid --------------------------------------------------------------------------------------------------------


def _our_sigmoid(setting: Setting, backend: Any = "auto") -> Loss:
    from lcl_kernels import sigmoid_contrastive_loss

    options = {"backend": backend, **_workspace(setting)}
    return lambda x, y, scale, bias: sigmoid_contrastive_loss(x, y, scale, bias, **options)


def eager_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One [M, M] matrix in the dtype of the features, the loss in float32."""
    logits = (scale * (x @ y.T)).float() + bias
    sign = 2 * torch.eye(len(x), device=x.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(x)


def _open_clip_sigmoid(setting: Setting) -> Loss:
    return _under_autocast(_open_clip_losses().SigLipLoss(), setting)


def _siglip_kernel(_: Setting) -> Loss:
    function = _import("siglip_kernel", "siglip-kernel").fused_siglip_loss
    return lambda x, y, scale, bias: function(x, y, scale.log(), bias)


def _by_name(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


# In order of importance: on a GPU one method after the other runs on all cases. Liger's SM90 kernels come last, because
# each shape compiles for longer than 20 seconds.
LOSSES = _by_name(
    Method(OURS, _our_losses, waits=True),
    Method(COUNTED, _our_counted_losses, gpu_only=True),
    Method("quack", _quack, gpu_only=True),
    Method("liger-kernel", _liger, gpu_only=True, waits=True),
    Method("cut-cross-entropy", _cut_cross_entropy, gpu_only=True, compiles=True, waits=True),
    Method("torch chunked", _torch_chunked),
    Method("torch.compile", lambda setting: _compile(eager_losses, setting), compiles=True),
    Method(EAGER, lambda _: eager_losses),
    Method("lcl_kernels torch", lambda setting: _our_losses(setting, "torch"), gpu_only=True, waits=True),
    Method("liger-kernel sm90", _liger_sm90, gpu_only=True),
)
CONTRASTIVE = _by_name(
    Method(OURS, _our_contrastive),
    Method("open_clip ClipLoss", _open_clip),
    Method("memeff", _memeff, gpu_only=True),
    Method("inf-cl", _inf_cl, gpu_only=True),
    Method("torch.compile", lambda setting: _compile(eager_contrastive, setting), compiles=True),
    Method(EAGER, lambda _: eager_contrastive),
    Method("lcl_kernels torch", lambda setting: _our_contrastive(setting, "torch"), gpu_only=True),
)
SIGMOID = _by_name(
    Method(OURS, _our_sigmoid),
    Method("open_clip SigLipLoss", _open_clip_sigmoid),
    Method("siglip-kernel", _siglip_kernel, gpu_only=True),
    Method("torch.compile", lambda setting: _compile(eager_sigmoid, setting), compiles=True),
    Method(EAGER, lambda _: eager_sigmoid),
    Method("lcl_kernels torch", lambda setting: _our_sigmoid(setting, "torch"), gpu_only=True),
)
