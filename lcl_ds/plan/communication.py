"""How long ranks take to exchange gradients, weights and features: latency plus bytes divided by bandwidth.

Collectives go around a ring, in which every rank sends and receives (N - 1) / N of the bytes, twice where they are
summed and handed back. The slowest link decides: that of a host's GPUs while all ranks are on one host, the network
where there are several. Latency counts a hop for each rank of a host and, between hosts, for each doubling.
"""

import math
from dataclasses import dataclass

from lcl_ds.gpus import Gpu
from lcl_ds.plan.contents import RowContents
from lcl_ds.plan.memory import Layout, Sizes

LINK_LATENCY_S, NETWORK_LATENCY_S = 5e-6, 15e-6
"""Of one hop, with the start of a collective. Assumptions: NCCL's of small messages on NVLink and InfiniBand."""
REACHED = 0.8
"""Fraction of a data sheet's bandwidth that large collectives reach. An assumption."""
HIDDEN = 0.8
"""Fraction of the arithmetic of a pass that exchanges beside it can hide behind. An assumption."""


@dataclass(frozen=True)
class Network:
    """What ranks exchange over."""

    ranks: int
    ranks_per_host: int
    link_bytes_per_s: float
    network_bytes_per_s: float
    link_latency_s: float = LINK_LATENCY_S
    network_latency_s: float = NETWORK_LATENCY_S

    @classmethod
    def of(cls, gpu: Gpu, ranks: int, hosts: int) -> "Network":
        per_host = math.ceil(ranks / hosts)
        return cls(ranks, per_host, REACHED * 1e9 * gpu.link_gb_per_s, REACHED * 1e9 * gpu.network_gb_per_s)

    def gather_s(self, size: float, messages: float = 1, ranks: int | None = None) -> float:
        """Compute the seconds in which all ranks get ``size`` bytes of which each has its share.

        Args:
            messages: collectives in which it is done.
            ranks: that take part, neighbours of each other; None: all.
        """
        n = ranks or self.ranks
        if n == 1 or not size:
            return 0.0
        on_one_host = n <= self.ranks_per_host
        bandwidth = self.link_bytes_per_s if on_one_host else min(self.link_bytes_per_s, self.network_bytes_per_s)
        hops = (min(n, self.ranks_per_host) - 1) * self.link_latency_s
        if not on_one_host:
            hops += math.log2(n / self.ranks_per_host) * self.network_latency_s
        return messages * hops + size * (n - 1) / n / bandwidth

    scatter_s = gather_s
    """The seconds in which ``size`` bytes of every rank are summed, each rank getting its share: the same way back."""

    def sum_s(self, size: float, messages: float = 1) -> float:
        """Compute the seconds in which ``size`` bytes of every rank are summed and every rank gets the sum."""
        return self.scatter_s(size, messages) + self.gather_s(size, messages)


@dataclass(frozen=True)
class Exchange:
    """Seconds of one step, by what goes on at the same time."""

    forward: float
    """Weights gathered beside the forward passes."""
    backward: float
    """Weights gathered and gradients sent beside the backward passes."""
    alone: float
    """Beside nothing: contrastive features, weights after the update, gradients that wait for the end."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.alone

    def waited_s(self, forward_s: float, backward_s: float) -> float:
        """Return the seconds that are not hidden behind so much arithmetic."""
        return max(0.0, self.forward - HIDDEN * forward_s) + max(0.0, self.backward - HIDDEN * backward_s) + self.alone


def exchange_of(
    layout: Layout, sizes: Sizes, network: Network, row: RowContents, rows: int, micro_steps: int
) -> Exchange:
    """Add up what one step exchanges.

    Args:
        rows: of a rank's micro-step.
    """
    weights, gradients = layout.weight_bytes * sizes.all, layout.weight_bytes * sizes.trained
    buckets = max(1.0, sizes.trained / max(1, layout.reduce_bucket))
    forward = backward = alone = 0.0
    if layout.stage == 0:
        alone = network.sum_s(gradients, buckets)
    elif layout.stage < 3:
        times = micro_steps if layout.stage == 2 or layout.overlap else 1
        sent = times * network.scatter_s(gradients, buckets)
        backward, alone = (sent, 0.0) if layout.overlap else (0.0, sent)
        alone += network.gather_s(gradients)  # the updated weights
    else:
        messages = max(1.0, sizes.all / max(1, layout.prefetch))
        whole = network.gather_s(weights, messages)
        near = network.gather_s(weights, messages, layout.secondary) if layout.secondary > 1 else whole
        again = 1 - min(1.0, layout.live_weights / sizes.all)  # the rest is kept from the forward pass
        sent = network.scatter_s(gradients, buckets)
        forward = micro_steps * whole
        backward = micro_steps * (again * near + (sent if layout.overlap else 0.0))
        alone = 0.0 if layout.overlap else micro_steps * sent
    features = row.pairs * rows * network.ranks * sizes.width
    each = network.gather_s(features * layout.weight_bytes) + network.scatter_s(4 * features)
    return Exchange(forward, backward, alone + micro_steps * each)
