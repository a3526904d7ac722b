"""Tables of counts, and the bars that they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cost_model import TWO_SIDED, Cost
from benchmarks.counting import MODES, Row
from benchmarks.reports import markdown
from benchmarks.schema import OK
from benchmarks.subjects import (
    FASTCL,
    OURS,
    RESTATED,
    TWO_SIDED_SETTING,
    lightly,
    open_clip_sigmoid,
)


def busiest(rows: Sequence[Row], **where: str | int) -> Row | None:
    """Of the ranks, the one that sends most (and multiplies most), or None where none is there."""
    found = [
        row
        for row in rows
        if row.status == OK and all(getattr(row, name) == x for name, x in where.items())
    ]
    return max(found, key=lambda row: (row.bytes_sent, row.flops), default=None)


def peer_of(family: str, rows: Sequence[Row]) -> tuple[str, str] | None:
    """Library and setting beside which a loss of ours stands."""
    if family == "clip":
        real = busiest(rows, library="open_clip", family="clip")
        library = RESTATED if real is None else "open_clip"
        return library, TWO_SIDED_SETTING
    chosen = {"siglip": open_clip_sigmoid("bidir"), "nt_xent": lightly()}.get(family)
    if chosen is None or busiest(rows, library=chosen.library, family=family) is None:
        return None
    return chosen.library, chosen.setting


_SENT_IN = tuple((x, y) for x in ("float32", "bfloat16") for y in ("float32", "bfloat16"))


def table(rows: Sequence[Row]) -> str:
    """One rank's counts, with the largest number of ranks; ratios are to the peer's."""
    head = ["loss", "GFLOP", "similarities", "tiles"]
    head += [f"MB, {_abbreviated(*dtypes)}" for dtypes in _SENT_IN]
    lines = []
    for family in OURS:
        peer = peer_of(family, rows)
        lines += [_line(FASTCL, family, mode, peer, rows) for mode in MODES]
        if peer is not None:
            lines.append(_line(peer[0], family, peer[1], None, rows))
    lines += [
        [f"{row.library} {row.family}", row.status, *[""] * (len(head) - 2)]
        for row in rows
        if row.status != OK and (row.ranks, row.embeddings) == (2, "float32") and 0 in row.alike
    ]
    return markdown(head, lines)


def _abbreviated(embeddings: str, gradients: str) -> str:
    short = {"float32": "fp32", "bfloat16": "bf16"}
    return f"{short[embeddings]} + {short[gradients]}"


def _line(
    library: str, family: str, setting: str, peer: tuple[str, str] | None, rows: Sequence[Row]
) -> list[str]:
    """Counts of one loss, and of what they are the peer's."""
    most = max(row.ranks for row in rows)

    def of(who: str, how: str, embeddings: str, gradients: str) -> Row | None:
        where: dict[str, str | int] = {"library": who, "setting": how, "embeddings": embeddings}
        return busiest(rows, ranks=most, family=family, gradients=gradients, **where)

    def beside(embeddings: str) -> Row | None:
        return None if peer is None else of(*peer, embeddings, embeddings)

    first, other = of(library, setting, "float32", "float32"), beside("float32")
    if first is None or first.flops is None:
        return [f"{library} {family}, {setting}", "failed", *[""] * 6]
    cells = [_beside(first.flops, other.flops if other else None, 1e9)]
    cells += [f"{first.similarities:,}", str(first.tiles)]
    for dtypes in _SENT_IN:
        row, other = of(library, setting, *dtypes), beside(dtypes[0])
        theirs = other.bytes_sent if other else None
        cells.append("" if row is None else _beside(row.bytes_sent, theirs, 1e6))
    return [f"{library} {family}, {setting}", *cells]


def _beside(figure: int, theirs: int | None, unit: float) -> str:
    """In that unit, and what part it is of another's."""
    return f"{figure / unit:.3f}" + (f" ({figure / theirs:.3f})" if theirs else "")


@dataclass(frozen=True)
class Bar:
    """A ratio to open_clip's two-sided local loss, on the number of ranks where it is largest."""

    title: str
    figure: float
    towers: float | None  # bytes: the same without statistics and header, as the model has them
    limit: float

    @property
    def verdict(self) -> str:
        """Met or missed."""
        return "met" if self.figure <= self.limit else "missed"


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Two thirds of the arithmetic, three quarters (bfloat16 sums: half) of the bytes."""
    return [
        bar
        for mode in MODES
        for embeddings, gradients in _SENT_IN
        for bar in _bars_of(mode, embeddings, gradients, rows)
    ]


def _bars_of(mode: str, embeddings: str, gradients: str, rows: Sequence[Row]) -> list[Bar]:
    peer = peer_of("clip", rows)
    assert peer is not None
    pairs = []
    for ranks in sorted({row.ranks for row in rows} - {1}):
        here: dict[str, str | int] = {"family": "clip", "embeddings": embeddings, "ranks": ranks}
        own = busiest(rows, library=FASTCL, setting=mode, gradients=gradients, **here)
        other = busiest(rows, library=peer[0], setting=peer[1], **here)
        if own is not None and other is not None:
            pairs.append((own, other))
    if not pairs:
        return []
    sent = max(own.bytes_sent / other.bytes_sent for own, other in pairs)
    towers = max(_towers(own) / other.bytes_sent for own, other in pairs)
    made = max((own.flops or 0) / (other.flops or 1) for own, other in pairs)
    name, limit = f"{mode}, {_abbreviated(embeddings, gradients)}", 3 / 4
    found = [Bar(f"{name}: bytes", sent, towers, limit if gradients == "float32" else 1 / 2)]
    if (embeddings, gradients) == _SENT_IN[0]:
        found.insert(0, Bar(f"{mode}: arithmetic", made, None, 2 / 3))
    return found


def _towers(row: Row) -> int:
    """Bytes of embeddings and their gradients alone."""
    return cost_of(row).sent.towers


def cost_of(row: Row, rank: int | None = None) -> Cost:
    """The model of a row of fastcl's (or of open_clip's two-sided loss): of its first rank."""
    rank = row.alike[0] if rank is None else rank
    mode = row.setting if row.library == FASTCL else TWO_SIDED
    b, w = (4 if x == "float32" else 2 for x in (row.embeddings, row.gradients))
    return Cost(row.family, mode, row.ranks, row.rows, row.dim, b, w, rank)


def bar_table(found: Sequence[Bar]) -> str:
    """Markdown."""
    lines = []
    for bar in found:
        towers = "" if bar.towers is None else f"{bar.towers:.4f}"
        lines.append([bar.title, f"{bar.figure:.4f}", towers, f"{bar.limit:.4f}", bar.verdict])
    return markdown(("clip against open_clip", "ratio", "towers alone", "limit", "verdict"), lines)
