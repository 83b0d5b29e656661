"""torch's own count of operations, also of what its counter does not look into: a CPU's attention, our operators."""

from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop, sdpa_flop


def flop_counter() -> FlopCounterMode:
    aten, ours = torch.ops.aten, torch.ops.lcl_kernels
    inside = {getattr(ours, name.split("::")[1]): _inside(name) for name in OPDEFS if name.startswith("lcl_kernels")}
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _raw(sdpa_flop),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _raw(sdpa_backward_flop),
    }
    return FlopCounterMode(display=False, custom_mapping={**attention, **inside})


def _raw(formula: Any) -> Any:
    """Let the counter hand over tensors: the formula looks at shapes itself."""

    def count(*arguments: Any, **options: Any) -> int:
        return formula(*arguments, **options)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


def _inside(name: str) -> Any:
    """Count what an operator computes by running it once more under a counter of its own."""

    def count(*arguments: Any, out_val: Any = None, **options: Any) -> int:
        # torch's counter does not know the product that is added in place.
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _raw(addmm_flop)}) as counter:
            OPDEFS[name]._init_fn(*arguments, **options)
        return counter.get_total_flops()

    return _raw(count)
