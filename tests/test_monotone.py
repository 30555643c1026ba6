"""Stairs and their fit, against scipy's solver and times that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from vllm_dspark.scheduler.monotone import StairTable, fit_tables, nonnegative_least_squares


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 5), (5, 7), (60, 41)])
@pytest.mark.parametrize("seed", range(5))
def test_solver_agrees_with_scipy(rows: int, columns: int, seed: int) -> None:
    """Catches unknowns freed or fixed in the wrong order: the residual is the least there is."""
    random = np.random.default_rng(seed)
    matrix, target = random.normal(size=(rows, columns)), random.normal(size=rows)
    solution = nonnegative_least_squares(matrix, target)
    assert (solution >= 0).all()
    _, expected = nnls(matrix, target)
    assert np.linalg.norm(matrix @ solution - target) == pytest.approx(expected, abs=1e-8)


def test_solver_ends_on_equal_columns() -> None:
    """Collinear columns, zero columns and a target that nothing can explain."""
    matrix = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    explained = matrix @ nonnegative_least_squares(matrix, np.array([2.0, 4.0]))
    assert explained == pytest.approx([3, 3])
    assert nonnegative_least_squares(matrix, np.array([-1.0, -1.0])).tolist() == [0, 0, 0]


def test_a_captured_size_pads() -> None:
    """Sizes up to a captured one cost the same, the next costs more, and past the largest
    nothing is padded."""
    table = StairTable([1, 8, 40, 64], [1.0, 8.0, 40.0, 64.0], [4, 8, 32])
    read = table.read(np.arange(70))
    assert read[:10].tolist() == [4, 4, 4, 4, 4, 8, 8, 8, 8, 32]
    assert read[32] == 32
    assert read[33:65].tolist() == list(range(33, 65))
    assert StairTable([1, 8], [1.0, 8.0], []).read(np.array([5])).tolist() == [5]


def test_captured_sizes_past_the_profile() -> None:
    """Their stairs go on with the slope of the profile's upper half."""
    table = StairTable([1, 8, 16], [1.0, 8.0, 32.0], [4, 16, 32])
    assert table.read(np.array([17, 32, 33])).tolist() == [80, 80, 83]


def test_graphs_and_what_lies_past_them_are_not_blended() -> None:
    """512 fits a graph, 768 and 1024 run without: 513 costs what they say, not nearly what 512
    does."""
    table = StairTable([256, 512, 768, 1024], [6.0, 7.0, 20.0, 24.0], [256, 512])
    assert table.read(np.array([512, 513, 640, 768, 1024])) == pytest.approx(
        [7, 20 - 255 / 64, 18, 20, 24]
    )
    alone = StairTable([256, 512, 768], [6.0, 7.0, 20.0], [256, 512])
    assert alone.read(np.array([512, 513, 768])).tolist() == [7, 20, 20]


@pytest.mark.parametrize("last", [64, 512, 2048])
def test_extrapolation_follows_a_line(last: int) -> None:
    sizes = np.unique(np.geomspace(1, last, 12).astype(int))
    table = StairTable(sizes, 5 + 0.03 * sizes, [])
    far = np.array([2 * last, 8 * last])
    np.testing.assert_allclose(table.read(far), 5 + 0.03 * far)


@pytest.mark.parametrize(("sizes", "times"), [([1, 32, 64], [5.0, 5.0, 5.0]), ([64], [5.0])])
def test_extrapolation_is_never_free(sizes: list[int], times: list[float]) -> None:
    """A flat end, or a single size, says nothing about the slope. A step 100 times as large
    costs several times as much, and never more than in proportion."""
    far = StairTable(sizes, times, []).read(np.array([6400]))[0]
    assert 3 * 5 < far <= 100 * 5


def test_smaller_than_profiled_costs_the_smallest() -> None:
    assert StairTable([8, 16], [4.0, 5.0], []).read(np.array([0, 1, 8])).tolist() == [4, 4, 4]


tables = st.lists(
    st.tuples(st.integers(1, 3000), st.floats(0, 100)), min_size=1, max_size=12,
    unique_by=lambda pair: pair[0],
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(tables, st.lists(st.integers(1, 600), max_size=12, unique=True))
def test_reading_never_falls(points: list[tuple[int, float]], captured: list[int]) -> None:
    """At no seam: captured, profiled, the first size past the graphs, the extrapolation."""
    sizes = np.array(sorted(size for size, _ in points))
    times = np.sort([time for _, time in points])
    read = StairTable(sizes, times, sorted(captured)).read(np.arange(6000))
    assert (np.diff(read) >= -1e-9).all()
    assert (read >= times[0]).all()


def test_fit_separates_tables_and_rates() -> None:
    """Two groups with tables of their own, two shared rates, all non-negative: exact without
    noise, and monotone with it where the truth is flat."""
    random = np.random.default_rng(0)
    groups = np.repeat([0, 3], 60)
    sizes = random.choice([1, 8, 64, 256], 120)
    amounts = random.uniform(0, 1000, (120, 2))
    truth = np.array([2.0, 2.0, 5.0, 9.0])
    times = truth[np.searchsorted([1, 8, 64, 256], sizes)] * (1 + groups) + amounts @ [0.003, 0.0]
    fit = fit_tables(groups, sizes, amounts, times, times)
    for group in (0, 3):
        assert fit.tables[group][0].tolist() == [1, 8, 64, 256]
        np.testing.assert_allclose(fit.tables[group][1], truth * (1 + group), rtol=1e-3)
    np.testing.assert_allclose(fit.rates, [0.003, 0.0], rtol=1e-3, atol=1e-6)
    noisy = fit_tables(groups, sizes, amounts, times * random.lognormal(0, 0.1, 120), times)
    assert all((np.diff(values) >= 0).all() for _, values in noisy.tables.values())
    assert (noisy.rates >= 0).all()


def test_a_rate_takes_only_what_the_table_cannot() -> None:
    """Rows grow with the size throughout the profile: all of it goes to the table, so that many
    tokens with few rows, a prefill, are not free."""
    sizes = np.array([1, 16, 64, 256])
    times = 5 + 0.03 * sizes
    fit = fit_tables(np.zeros(4, dtype=int), sizes, sizes[:, None] * 1.0, times, times)
    np.testing.assert_allclose(fit.tables[0][1], times, rtol=1e-3)
    assert fit.rates[0] < 0.03 * 0.01
