"""Crews of 2, 3 and 4 processes, started when a test first wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.crew import Crew


@pytest.fixture(scope="session")
def crew_of() -> Iterator[Callable[[int], Crew]]:
    """The crew of a size, which all tests share."""
    crews: dict[int, Crew] = {}

    def crew(size: int) -> Crew:
        if size not in crews or not all(p.is_alive() for p in crews[size].processes):
            crews[size] = Crew(size)
        return crews[size]

    yield crew
    for each in crews.values():
        each.dismiss()


@pytest.fixture
def own_crew() -> Iterator[Callable[..., Crew]]:
    """A crew that a test may ruin."""
    made: list[Crew] = []

    def crew(size: int, timeout: float) -> Crew:
        made.append(Crew(size, timeout))
        return made[-1]

    yield crew
    for each in made:
        each.dismiss()
