"""A request to stop, heard but not obeyed at once."""

import signal
from types import FrameType


class StopRequest:
    """Remembers SIGTERM and SIGINT while the block runs, so that the loop can save at the next step boundary.

    Repeated signals change nothing: launchers and terminals send several. The previous handlers return at the end.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._remember) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
