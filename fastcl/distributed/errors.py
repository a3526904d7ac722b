"""What goes wrong between ranks."""

from __future__ import annotations


class RanksDisagree(ValueError):
    """Ranks called the same loss with arguments that do not belong together."""


class RankFailed(RuntimeError):
    """Another rank raised, so that this one cannot go on either."""


class RankLost(RuntimeError):
    """Another rank died, or did not come to the same call in time."""
