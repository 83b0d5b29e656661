"""How long a step takes, from its operations, its exchanges and stated efficiencies. Nothing here was measured."""

from dataclasses import dataclass

from lcl_ds.flops import Flops, StepWork, total
from lcl_ds.gpus import Gpu
from lcl_ds.plan.communication import Exchange
from lcl_ds.plan.memory import Layout, Sizes
from lcl_ds.training.muon import ITERATIONS

EFFICIENCIES: dict[str, tuple[float, str]] = {
    "vision": (0.29, "NeMo's ViT-g/14 on 8 H100, published 28.9 %"),
    "pooling": (0.29, "as vision"),
    "decoder": (0.39, "NeMo AutoModel's Llama-3-70B on 64 H100, published 389 of 989 TFLOPS"),
    "head": (0.66, "linear cross entropy on an H100, bench_results/losses_h100.json: 657 TFLOPS at width 2048"),
    "contrastive": (0.57, "contrastive loss on an H100, bench_results/contrastive_h100.json: 559 TFLOPS"),
}
"""Fraction of the bf16 peak that a part's operations reach, elementwise work and launches in their time, and where the
figure is from. Other systems' figures for the towers; our own losses, measured."""
NARROW_HEAD = (1024, 0.22, "bench_results/losses_h100.json: 221 TFLOPS at width 768")
"""Below this width of the decoder the head reaches that fraction."""
UPDATE_BYTES = 34
"""Read and written by the optimizer for each weight: gradient, master, two moments, the weight itself."""
ORTHOGONAL_EFFICIENCY = 0.4
"""Fraction of the bf16 peak that Muon's products reach. An assumption."""
HOST_BYTES_PER_S = 25e9
"""Between a GPU and its host, PCIe 5 shared by what else goes there. An assumption."""
HOST_UPDATE_BYTES_PER_S = 25e9
"""Memory bandwidth of a host for the update of one rank. An assumption: eight ranks share 200 GB/s."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    parts: dict[str, float]
    """Of arithmetic, by part."""
    waited: float
    """For exchanges that arithmetic does not hide."""
    exchanged: float
    """All exchanges, hidden or not."""
    update: float

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.waited + self.update


def step_time(
    flops: dict[str, Flops],
    work_on_rows: float,
    gpu: Gpu,
    layout: Layout,
    sizes: Sizes,
    exchange: Exchange,
    towers: float | None = None,
) -> StepTime:
    """Compute the seconds of a step.

    Args:
        flops: of one step of all ranks.
        work_on_rows: what the decoder's attention costs beyond documents of their own, in operations of all ranks.
        towers: fraction of the peak that vision, pooling and decoder reach; None: those of :data:`EFFICIENCIES`.
    """
    peak = 1e12 * gpu.peak_tflops * (1.0 if layout.weight_bytes == 2 else 0.5) * layout.ranks
    reached = efficiencies(sizes.width, towers)
    parts = {name: some.computed / (peak * reached[name]) for name, some in flops.items()}
    parts["decoder"] += work_on_rows / (peak * reached["decoder"])
    everything = total(flops)
    arithmetic = sum(parts.values())
    forward = arithmetic * everything.forward / max(1.0, everything.computed)
    waited = exchange.waited_s(forward, arithmetic - forward)
    return StepTime(parts, waited, exchange.total, _update_s(gpu, layout, sizes))


def efficiencies(width: int, towers: float | None) -> dict[str, float]:
    """List the fraction of the peak that each part is planned with."""
    reached = {name: fraction for name, (fraction, _) in EFFICIENCIES.items()}
    if width < NARROW_HEAD[0]:
        reached["head"] = NARROW_HEAD[1]
    if towers is not None:
        reached |= dict.fromkeys(("vision", "pooling", "decoder"), towers)
    return reached


def source_of(part: str, width: int, towers: float | None) -> str:
    """Say where the figure of :func:`efficiencies` is from."""
    if towers is not None and part in ("vision", "pooling", "decoder"):
        return "as given"
    return NARROW_HEAD[2] if part == "head" and width < NARROW_HEAD[0] else EFFICIENCIES[part][1]


def _update_s(gpu: Gpu, layout: Layout, sizes: Sizes) -> float:
    """Compute the seconds of the optimizer's update; what ranks exchange under Muon is not counted."""
    orthogonal = orthogonal_flops(sizes.matrices) / (1e12 * gpu.peak_tflops * ORTHOGONAL_EFFICIENCY * layout.ranks)
    return orthogonal + _elementwise_s(gpu, layout, sizes)


def orthogonal_flops(matrices: tuple[tuple[int, int], ...]) -> float:
    """Count the operations that make matrices orthogonal: three products in each of Newton and Schulz's steps."""
    ordered = [(min(shape), max(shape)) for shape in matrices]
    return float(ITERATIONS * sum(4 * short**2 * long + 2 * short**3 for short, long in ordered))


def _elementwise_s(gpu: Gpu, layout: Layout, sizes: Sizes) -> float:
    own = sizes.trained / (layout.ranks if layout.stage else 1)
    if layout.offload_optimizer:
        copied = (layout.gradient_bytes + layout.weight_bytes) * own / HOST_BYTES_PER_S
        return copied + UPDATE_BYTES * own / HOST_UPDATE_BYTES_PER_S
    return UPDATE_BYTES * own / (1e9 * gpu.memory_gb_per_s)


@dataclass(frozen=True)
class Cost:
    """What a whole run takes."""

    days: float
    gpu_hours: float
    dollars: float | None

    @classmethod
    def of(cls, step_s: float, steps: int, gpus: int, price: float | None) -> "Cost":
        hours = step_s * steps / 3600
        return cls(hours / 24, hours * gpus, None if price is None else hours * gpus * price)


def utilisation(flops: dict[str, Flops], step_s: float, gpu: Gpu, ranks: int) -> float:
    """Return the model FLOPs utilisation, by bf16's peak as the metrics of a run have it."""
    return total(flops).model / (step_s * ranks * gpu.peak_tflops * 1e12)


def images_per_s(work: StepWork, step_s: float) -> float:
    return work.images / step_s
