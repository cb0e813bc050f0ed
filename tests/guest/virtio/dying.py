"""A process that dies between two stores: shared memory that stops taking them."""

from __future__ import annotations

from typing import Any


class Died(Exception):
    """The process is no more: no store after this one is made."""


class Life:
    """Counts the stores into shared memory that a process makes, and ends it after some."""

    def __init__(self, n_stores: int | None = None) -> None:
        """None: it lives on, and `n_stores` counts."""
        self.left = n_stores
        self.made = 0

    def store(self, target: Any, index: Any, value: Any) -> None:
        if self.left is not None and self.made >= self.left:
            raise Died
        target[index] = value
        self.made += 1

    def watch(self, view: Any) -> Any:
        """`view`, mortal: of a memoryview it has what the queues use."""
        return _Mortal(view, self)


class _Mortal:
    def __init__(self, view: Any, life: Life) -> None:
        self._view = view
        self._life = life

    def __getitem__(self, index: Any) -> Any:
        return self._view[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._life.store(self._view, index, value)

    def __len__(self) -> int:
        return len(self._view)

    def cast(self, format_: str) -> Any:
        return _Mortal(self._view.cast(format_), self._life)
