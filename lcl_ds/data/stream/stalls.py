"""Name the sample that a process is reading when that takes too long, as from a file system that hangs."""

import logging
import threading
import time

from lcl_ds.data.shards.source import Source

logger = logging.getLogger(__name__)


class StallWatch:
    """A thread of a loading process that looks at what is being read.

    Args:
        seconds: a sample that is read for longer is named in the log, once.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._reading: tuple[Source, int, float] | None = None
        threading.Thread(target=self._look, daemon=True, name="stall-watch").start()

    def begin(self, source: Source, sample: int) -> None:
        """Note that this sample is being read from now on."""
        self._reading = source, sample, time.monotonic()

    def end(self) -> None:
        """Note that nothing is being read."""
        self._reading = None

    def _look(self) -> None:
        named = None
        while True:
            time.sleep(self.seconds / 4)
            reading = self._reading
            if reading is None or reading is named:
                continue
            source, sample, since = reading
            if time.monotonic() - since >= self.seconds:
                named = reading
                where = source.where(sample, is_read=False)  # what hangs would hold this thread as well
                logger.warning("still reading %s after %.3g s", where, time.monotonic() - since)
