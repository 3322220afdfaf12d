"""The multiple-choice knapsack, exactly: one option for each item, least loss within a budget.

States (size, loss) are kept while no other is at most as large and as lossy (Nemhauser and Ullmann
1969), and while their bound by one Lagrangian multiplier does not exceed a known solution (as
Pisinger 1995 prunes, "A minimal algorithm for the multiple-choice knapsack problem").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Sizes = npt.NDArray[np.int64]
Losses = npt.NDArray[np.float64]

BISECTIONS = 80
# Sums in another order differ so much; a bound that is broken by less is none.
ROUNDING = 1e-9


def choose(sizes: Sequence[Sizes], losses: Sequence[Losses], budget: int) -> list[int]:
    """The number of the option that each item takes, for the least sum of losses.

    Args:
        sizes: of each item, int64 [options].
        losses: of each item, float64 [options], finite.
        budget: that the sum of sizes must not exceed.

    Raises:
        ValueError: not even the smallest options fit, or a loss is not finite.
    """
    if any(not np.isfinite(loss).all() for loss in losses):
        raise ValueError("a loss is not finite")
    if sum(int(size.min()) for size in sizes) > budget:
        raise ValueError(f"the smallest options are larger than {budget}")
    multiplier, known = _multiplier(sizes, losses, budget)
    search = _Search(sizes, losses, budget, multiplier, known)
    for item in range(len(sizes)):
        search.add(item)
    return search.best()


def _multiplier(
    sizes: Sequence[Sizes], losses: Sequence[Losses], budget: int
) -> tuple[float, float]:
    """The loss that a byte is worth at the budget, and the loss of a solution that fits."""

    def at(multiplier: float) -> tuple[int, float]:
        """Size and loss where every byte has this price."""
        total_size, total_loss = 0, 0.0
        for size, loss in zip(sizes, losses, strict=True):
            option = int(np.argmin(loss + multiplier * size))
            total_size += int(size[option])
            total_loss += float(loss[option])
        return total_size, total_loss

    known = 0.0
    for item_size, item_loss in zip(sizes, losses, strict=True):
        known += float(item_loss[np.lexsort((item_loss, item_size))[0]])
    size, loss = at(0.0)
    if size <= budget:
        return 0.0, min(loss, known)
    low, high = 0.0, 1.0
    while at(high)[0] > budget and high < 1e300:
        low, high = high, high * 16
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        size, loss = at(middle)
        if size > budget:
            low = middle
        else:
            high, known = middle, min(known, loss)
    return high, known


class _Search:
    """The states after some items, and how each came to be."""

    def __init__(
        self,
        sizes: Sequence[Sizes],
        losses: Sequence[Losses],
        budget: int,
        multiplier: float,
        known: float,
    ) -> None:
        self._sizes, self._losses = sizes, losses
        self._budget, self._multiplier = budget, multiplier
        # Of the items after each: the least that they take, and the least of loss and price.
        self._least_size = _sums_after([int(s.min()) for s in sizes])
        prices = [
            float((loss + multiplier * size).min())
            for size, loss in zip(sizes, losses, strict=True)
        ]
        self._least_price = _sums_after(prices)
        scale = abs(known) + multiplier * budget
        scale += sum(float(np.abs(loss).max()) for loss in losses)
        self._most = known + multiplier * budget + ROUNDING * scale
        self._size = np.zeros(1, dtype=np.int64)
        self._loss = np.zeros(1, dtype=np.float64)
        self._history: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]] = []

    def add(self, item: int) -> None:
        """Let every state take every option of the next item; keep what can still be best."""
        sizes, losses = self._sizes[item], self._losses[item]
        states = len(self._size)
        size = (self._size[None, :] + sizes[:, None]).reshape(-1)
        loss = (self._loss[None, :] + losses[:, None]).reshape(-1)
        hopeful = size + self._least_size[item] <= self._budget
        price = loss + self._multiplier * size + self._least_price[item]
        kept = np.flatnonzero(hopeful & (price <= self._most))
        kept = kept[np.lexsort((loss[kept], size[kept]))]
        before = np.concatenate([[np.inf], np.minimum.accumulate(loss[kept])[:-1]])
        kept = kept[loss[kept] < before]
        option, parent = np.divmod(kept, states)
        self._history.append((parent.astype(np.int32), option.astype(np.uint8)))
        self._size, self._loss = size[kept], loss[kept]

    def best(self) -> list[int]:
        """The options of the state of least loss; of all states the larger ones lose less."""
        state, picked = len(self._loss) - 1, []
        for parent, option in reversed(self._history):
            picked.append(int(option[state]))
            state = int(parent[state])
        return picked[::-1]


def _sums_after(values: list[int] | list[float]) -> npt.NDArray[np.float64]:
    """The sum of all that come after each; sums of bytes are exact below 2^53."""
    array = np.array(values, dtype=np.float64)
    sums: npt.NDArray[np.float64] = np.cumsum(array[::-1])[::-1] - array
    return sums
