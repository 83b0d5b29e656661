"""What a benchmark measures at a time: one shape of one loss, with its data and what is true of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lcl_ds.bench.peers import Method, Setting

Inputs = tuple[Tensor, ...]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case(Setting, ABC):
    """One line of work for all methods."""

    timed: bool = True
    """False: memory alone, for a sweep."""
    checked: bool = True
    """False: errors are those of another case."""

    @property
    @abstractmethod
    def methods(self) -> dict[str, Method]: ...

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    @abstractmethod
    def useful_flops(self) -> float:
        """Floating point operations of a step that does nothing twice and nothing for ignored rows."""

    @property
    @abstractmethod
    def result_names(self) -> tuple[str, ...]:
        """Names of the loss and of the gradients that are compared with float64, in the order of the inputs."""

    def describe(self) -> Row:
        """What goes into every row of the JSON."""
        return {"dtype": self.dtype_name, "device": self.device_name, "seed": self.seed, "timed": self.timed}

    @abstractmethod
    def inputs(self) -> Inputs:
        """Leaves, those that are trained with ``requires_grad``. The same numbers at every call."""

    @abstractmethod
    def first_rows(self, inputs: Inputs, rows: int) -> Inputs:
        """The same data with fewer rows, as new leaves."""

    @abstractmethod
    def truth(self, *inputs: Tensor) -> Tensor:
        """The loss of float64 inputs by the book."""

    @property
    @abstractmethod
    def truth_rows(self) -> int:
        """How many rows the float64 loss can take."""
