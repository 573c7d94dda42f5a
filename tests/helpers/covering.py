"""Chooses the cases of a parametrization that `make test` runs.

A case covers its parameters' values and the pairs of its features. Together, the chosen cases cover
everything that all cases cover. The others are marked `extra`; `make test-all` runs them, and so does CI.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest


def chosen(shown: list[set[Hashable]]) -> set[int]:
    """Return indices of sets whose union is the union of all sets.

    A greedy choice: always the set that adds most, and the first of several that add equally.
    """
    left: set[Hashable] = set().union(*shown)
    picked = set()
    while left:
        best = max(range(len(shown)), key=lambda i: len(shown[i] & left))
        picked.add(best)
        left -= shown[best]
    return picked


def covered(
    *,
    by: Callable[..., Iterable[Hashable]] | None = None,
    indirect: Sequence[str] = (),
    **parameters: Iterable[Any] | Mapping[str, Any],
) -> pytest.MarkDecorator:
    """Parametrize a test over all combinations of the parameters' values; mark the ones that aren't chosen `extra`.

    The chosen cases are enough to cover every feature and every pair of features of a case.
    parameters: the values of each, or a mapping from names to values. Values without a name are named by str().
    by: a function that returns a case's features, given its parameters; by default they are the parameters themselves.
    indirect: as in `pytest.mark.parametrize`.
    """
    values = [
        list(v.items()) if isinstance(v, Mapping) else [(str(value), value) for value in v] for v in parameters.values()
    ]
    cases = list(itertools.product(*values))

    def shown(case: tuple[tuple[str, Any], ...]) -> set[Hashable]:
        names = [name for name, _ in case]
        features = names if by is None else by(*(value for _, value in case))
        pairs = set(itertools.combinations(enumerate(features), 2))
        return pairs if by is None and len(names) > 1 else {*enumerate(names), *pairs}

    picked = chosen([shown(case) for case in cases])
    return pytest.mark.parametrize(
        tuple(parameters),
        [
            pytest.param(
                *(value for _, value in case),
                id="-".join(name for name, _ in case),
                marks=() if i in picked else pytest.mark.extra,
            )
            for i, case in enumerate(cases)
        ],
        indirect=indirect,
    )


def each(*_: Any) -> tuple[()]:
    """Return no features; as `by` of `covered`, it asks for each value of each parameter, but not for pairs."""
    return ()


def extra(*values: Any) -> Any:
    """Return a case marked `extra`, for lists of cases written by hand."""
    return pytest.param(*values, marks=pytest.mark.extra)


def some_seeds(count: int) -> list[Any]:
    """Return range(count) as cases, all but the first four marked `extra`."""
    return [seed if seed < 4 else extra(seed) for seed in range(count)]
