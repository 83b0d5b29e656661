"""Give a network its first weights, one module after the other, so that the whole of it need not lie in one place.

A network is built without memory (:func:`accelerate.init_empty_weights`); then each block in turn gets memory and
values, and whoever fills it may move it away or cut it up before the next one. Every value that is drawn comes from a
generator that is seeded with the run's seed and the weight's name, by the rule of the module's own class. It depends on
nothing else: neither on the order, nor on other weights, nor on ranks and ZeRO stages.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lcl_ds.errors import UserError
from lcl_ds.models.blocks import blocks_of

OF_NETWORK = "model."
"""What stands before the names of the network's weights inside an objective."""

GivenWeights = Mapping[str, Callable[[], Tensor]]
"""What reads a weight that is given, by its name in the network."""


@dataclass(frozen=True)
class Unit:
    """A part of a model that is filled at once: a block of a tower, an embedding, a head."""

    name: str
    """Of its module in the model."""
    module: nn.Module
    tower: PreTrainedModel | None
    """The transformers model that it belongs to, whose rule draws its weights."""

    def weights(self) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
        """List its weights: the name in the network, the module that holds it, and its name there."""
        for where, module in self.module.named_modules(prefix=self.name):
            for leaf, weight in module.named_parameters(recurse=False):
                yield network_name(f"{where}.{leaf}" if where else leaf), module, leaf, weight


def network_name(name: str) -> str:
    """Return a weight's name in the network, given that in the network or in an objective."""
    return name.removeprefix(OF_NETWORK)


def units(model: nn.Module, name: str = "", tower: PreTrainedModel | None = None) -> Iterator[Unit]:
    """Cut a model into its units: what holds blocks is taken apart, everything else stays whole.

    A family's rule may act on a module together with what is inside it, but not across blocks.
    """
    tower = model if isinstance(model, PreTrainedModel) else tower
    holds_blocks = any(inner is not model for inner in blocks_of(model))
    if holds_blocks and not any(True for _ in model.parameters(recurse=False)):
        for child_name, child in model.named_children():
            yield from units(child, f"{name}.{child_name}" if name else child_name, tower)
    elif any(True for _ in model.parameters()):
        yield Unit(name, model, tower)


@torch.no_grad()
def fill_weights(
    model: nn.Module,
    seed: int,
    given: GivenWeights | None = None,
    finish: Callable[[nn.Module], object] | None = None,
    *,
    has_values: bool = True,
    within: Collection[str] = (),
) -> None:
    """Give memory and values to the weights of ``model`` that have none, fp32 on the CPU.

    Args:
        model: a network or an objective, built without memory as a whole or in part.
        seed: of what is drawn.
        given: weights that are read instead.
        finish: is called with every unit, once it is filled, before the next one gets memory.
        has_values: False: leave all values NaN, since they will come from elsewhere.
        within: names of the modules outside of which nothing is filled; none named: everything is.

    Raises:
        UserError: a given weight cannot be read. All other units were filled and finished by then, so that ranks which
            meet in ``finish`` still do.
    """
    towers = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    problems: list[str] = []
    mistake: Exception | None = None
    with torch.random.fork_rng(devices=[]):
        for unit in units(model):
            if within and not f"{network_name(unit.name)}.".startswith(tuple(f"{name}." for name in within)):
                continue
            new = _give_memory(unit)
            if has_values and new:
                try:
                    _give_values(unit, new, seed, given or {}, towers)
                except (UserError, OSError, ValueError) as error:
                    problems.append(str(error))
                except Exception as error:  # ours or a family's: told once the ranks have done with each other
                    mistake = mistake or error
            if finish is not None:
                finish(unit.module)
    if mistake is not None:
        raise mistake
    if problems:
        raise UserError(problems)


def _give_memory(unit: Unit) -> dict[str, nn.Parameter]:
    """Replace the unit's weights that have no memory by such as are NaN; returns them by name."""
    new: dict[str, nn.Parameter] = {}
    known: dict[nn.Parameter, nn.Parameter] = {}
    for name, module, leaf, weight in list(unit.weights()):
        if not weight.is_meta:
            continue
        if weight not in known:  # modules may share one
            values = torch.full(weight.shape, torch.nan, dtype=weight.dtype)
            new[name] = known[weight] = nn.Parameter(values, requires_grad=weight.requires_grad)
        setattr(module, leaf, known[weight])
    return new


def _give_values(
    unit: Unit, new: dict[str, nn.Parameter], seed: int, given: GivenWeights, towers: list[PreTrainedModel]
) -> None:
    drawn = {name: weight for name, weight in new.items() if name not in given}
    if drawn:
        with _NamedDraws(new, drawn.keys(), seed):
            _draw(unit.module, unit.tower, towers)
    for name in new.keys() & given.keys():
        new[name].copy_(given[name]())
    if untouched := sorted(name for name, weight in drawn.items() if weight.isnan().any()):
        raise ValueError(f"{', '.join(untouched)}: the family's own rule does not say what this weight starts from")


def _draw(module: nn.Module, tower: PreTrainedModel | None, towers: list[PreTrainedModel]) -> None:
    """Apply the rules of the module's classes, innermost first, as if each had been built alone."""
    for child in module.children():
        _draw(child, child if isinstance(child, PreTrainedModel) else tower, towers)
    reset: Any = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
    elif tower is None:  # a norm that was taken out of a tower
        tower = next((one for one in towers if type(one).__module__ == type(module).__module__), None)
    if tower is not None:
        tower._init_weights(module)


class _NamedDraws(TorchFunctionMode):
    """While it is entered, whatever changes one of these weights in place draws from a generator of the weight's own.

    Args:
        weights: by name.
        drawn: names of those that are changed at all; the others stay as they are.
    """

    def __init__(self, weights: Mapping[str, Tensor], drawn: Collection[str], seed: int):
        super().__init__()
        self.names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
        self.drawn, self.seed = drawn, seed

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        changed = args[0] if args else kwargs.get("tensor")  # the functions of torch.nn.init pass themselves on by name
        name = self._changed_by(function.__name__, changed)
        if name is not None:
            if name not in self.drawn:
                return changed
            torch.default_generator.manual_seed(seed_of(self.seed, name, changed.storage_offset()))
        return function(*args, **kwargs)

    def _changed_by(self, function: str, tensor: Any) -> str | None:
        """Name the weight that a function changes in place, if it is one of these."""
        if not isinstance(tensor, Tensor) or not function.endswith("_") or function.endswith("__"):
            return None
        return self.names.get(tensor.untyped_storage().data_ptr())


def seed_of(seed: int, name: str, offset: int = 0) -> int:
    """Make the seed from which the elements of a weight from ``offset`` on are drawn."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name} {offset}".encode(), digest_size=8).digest(), "big")
