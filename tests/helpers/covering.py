"""Which cases of a parametrization `make test` runs: enough that nothing a case stands for goes untried.

What a case stands for: each of its parameters, and each pair of its features. The cases that add nothing are marked
`extra` and run by `make test-all`, as CI does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest


def chosen(shown: list[set[Hashable]]) -> set[int]:
    """Indices of sets that hold together what all of them hold: the one that adds most, over and over, the first among
    equals."""
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
    """`pytest.mark.parametrize` over all combinations of the parameters' values, of which a covering choice is not
    `extra`. A mapping names its values; other values are named as str() does.

    by: gives the features of a case, called with its parameters; without it they are the parameters themselves.
    indirect: the parameters that go to the fixture of their name.
    """
    values = [
        list(v.items()) if isinstance(v, Mapping) else [(str(one), one) for one in v] for v in parameters.values()
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
    """For `by`: each value of each parameter is tried, in whatever company."""
    return ()


def extra(*values: Any) -> Any:
    """A case of a list made by hand that isn't in its covering choice."""
    return pytest.param(*values, marks=pytest.mark.extra)


def some_seeds(count: int) -> list[Any]:
    """range(count), of which all but a few are `extra`."""
    return [seed if seed < 4 else extra(seed) for seed in range(count)]
