"""Say what happens to bad input while training, in one place.

- A shard that is missing, cut short or no plain tar ends the run before a model is built (``index_shard``). An empty
  one is passed over with a warning. One that goes away while the run uses it costs its samples, each a read error.
- A member that cannot be used (stored as a sparse file, too large, there twice, not beside the others of its sample)
  costs its own sample.
- A damaged or hostile sample is left out. An image that cannot be decoded goes with its placeholder and its text stays;
  a document of which nothing is left goes as a whole.
- A document that ``data.exclude`` names is left out; it does not count as a bad one.
- Everything left out is counted by source and reason, appears in ``skipped_samples``, and the 1st, 10th, 100th, ... of
  a kind is logged with shard and key.
- When more than ``data.max_bad_share`` of the last thousand documents and images were bad, the run ends: such data
  needs repair, not patience.
- An error in our own code is never taken for a bad sample: only :class:`BadSampleError`, which is raised around the
  reading of outside bytes, and ``OSError`` from reading a shard count as bad input.
"""

import logging
from collections import Counter, deque

from lcl_ds.data.documents import BadSampleError
from lcl_ds.data.shards.source import Source
from lcl_ds.errors import UserError

logger = logging.getLogger(__name__)

EXCLUDED = "excluded by data.exclude"
RECENT = 1000
"""Documents and images that the fraction of bad ones is taken of."""


class Skips:
    """Counts what one process left out.

    Args:
        max_bad_share: of recent documents and images; more ends the run.
    """

    def __init__(self, max_bad_share: float):
        self.max_bad_share = max_bad_share
        self.counts: Counter[tuple[str, str]] = Counter()
        """By source and reason."""
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._recent_bad = 0

    def good(self) -> None:
        """Count a document or image that was used."""
        self._add(False)

    def bad(self, source: Source, sample: int, problem: BadSampleError | OSError) -> None:
        """Count a document or image that was left out.

        Raises:
            UserError: too many recent ones were bad; names the most frequent reasons.
        """
        self._count(source, sample, reason_of(problem))
        self._add(True)
        if len(self._recent) == RECENT and self._recent_bad > self.max_bad_share * RECENT:
            most = ", ".join(f"{name}: {reason} ({n})" for (name, reason), n in self.counts.most_common(3))
            raise UserError(
                f"data: {self._recent_bad} of the last {RECENT} documents and images could not be used, more than "
                f"data.max_bad_share {self.max_bad_share:g} allows; most often {most}; last in {source.where(sample)}; "
                "python -m lcl_ds.data check SHARDS names them all"
            )

    def excluded(self, source: Source, sample: int) -> None:
        """Count a document that the user left out; it says nothing about the rest of the data."""
        self._count(source, sample, EXCLUDED)

    def _count(self, source: Source, sample: int, reason: str) -> None:
        kind = source.name, reason
        self.counts[kind] += 1
        if is_power_of_ten(self.counts[kind]):
            logger.warning("left out %s: %s (%d so far)", source.where(sample), reason, self.counts[kind])

    def _add(self, bad: bool) -> None:
        if len(self._recent) == RECENT:
            self._recent_bad -= self._recent[0]
        self._recent.append(bad)
        self._recent_bad += bad


def reason_of(problem: BadSampleError | OSError) -> str:
    """Name the kind of a problem by a short phrase of a bounded set."""
    if isinstance(problem, BadSampleError):
        return problem.reason
    return f"a read error ({problem.strerror or 'the shard is shorter or out of reach'})"


def is_power_of_ten(number: int) -> bool:
    return number == 10 ** (len(str(number)) - 1)
