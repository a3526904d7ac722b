"""One loss over the rows of many processes: see docs/distributed.md for the convention."""

from fastcl.distributed.errors import RankFailed, RankLost, RanksDisagree
from fastcl.distributed.pieces import (
    gather_rows,
    logsumexp_over_ranks,
    row_counts,
    sum_over_ranks,
)
from fastcl.distributed.team import set_timeout

__all__ = [
    "RankFailed",
    "RankLost",
    "RanksDisagree",
    "gather_rows",
    "logsumexp_over_ranks",
    "row_counts",
    "set_timeout",
    "sum_over_ranks",
]
