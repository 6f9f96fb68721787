"""The sparse graph keeps the bounds its docstring states."""

from __future__ import annotations

import random
from math import comb

import pytest

from common.errors import SecAggError
from common.secagg.graph import Graph, Shape, shape_of


def shape(size: int, dropouts: int, colluders: int, complete_up_to: int = 32) -> Shape:
    return shape_of(
        size=size, threshold=size - dropouts, colluders=colluders, complete_up_to=complete_up_to
    )


@pytest.mark.parametrize("size", [3, 8, 32])
def test_complete_up_to_32(size: int) -> None:
    found = shape(size, 1, 0)
    assert (found.window, found.degree, found.share_threshold) == (0, size - 1, size - 1)
    graph = Graph(found, b"seed")
    assert graph.neighbours(2) == [0, 1, *range(3, size)]
    graph.check(set())


@pytest.mark.parametrize(
    ("size", "dropouts", "colluders", "degree"),
    [(100, 5, 5, 22), (1000, 20, 20, 50), (1000, 50, 50, 78)],
)
def test_degrees_stated(size: int, dropouts: int, colluders: int, degree: int) -> None:
    found = shape(size, dropouts, colluders)
    assert found.degree == degree
    assert found.share_threshold == 2 * found.quorum - 1
    # Two windows of survivors rebuild, two windows of colluders do not.
    assert 2 * found.quorum >= found.share_threshold > 2 * (found.quorum - 1)
    # The bounds, computed another way: one window's hypergeometric tail, times the windows.
    for marked, least, limit in (
        (colluders, found.quorum, 2.0**-80),
        (dropouts, found.window - found.quorum + 1, 2.0**-20),
    ):
        tail = sum(
            comb(found.window, held) * comb(size - found.window, marked - held) / comb(size, marked)
            for held in range(least, min(marked, found.window) + 1)
        )
        assert size * tail <= limit * 1.000001


def test_neighbours_are_mutual_distinct_and_random() -> None:
    found = shape(100, 5, 5)
    graph, other = Graph(found, b"one"), Graph(found, b"two")
    for one in range(100):
        neighbours = graph.neighbours(one)
        assert len(set(neighbours)) == found.degree
        assert one not in neighbours
        assert all(one in graph.neighbours(each) for each in neighbours)
    assert any(graph.neighbours(one) != other.neighbours(one) for one in range(100))
    assert Graph(found, b"one").neighbours(7) == graph.neighbours(7)


def test_whoever_passes_the_check_is_in_one_piece() -> None:
    """The honest survivors stay connected for every set of colluders below the quorum a window."""
    found = shape(60, 3, 2, complete_up_to=10)
    assert found.window > 0
    chance = random.Random(1)  # noqa: S311 - a repeatable test
    for draw in range(200):
        graph = Graph(found, draw.to_bytes(4, "big"))
        gone = set(chance.sample(range(60), 3))
        alive = set(range(60)) - gone
        graph.check(alive)
        honest = alive - set(chance.sample(sorted(alive), 2))
        reached = {min(honest)}
        frontier = list(reached)
        while frontier:
            for each in graph.neighbours(frontier.pop()):
                if each in honest and each not in reached:
                    reached.add(each)
                    frontier.append(each)
        assert reached == honest


def test_a_gap_in_the_ring_is_refused() -> None:
    found = shape(60, 3, 2, complete_up_to=10)
    graph = Graph(found, b"gap")
    lost = set(graph._ring[: found.window - found.quorum + 1])
    with pytest.raises(SecAggError, match="neighbours on the ring"):
        graph.check(set(range(60)) - lost)
    graph.check(set(range(60)) - set(list(lost)[1:]))


def test_where_sparse_saves_nothing_it_is_complete() -> None:
    assert shape(33, 12, 8).window == 0
