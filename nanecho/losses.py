"""The training loss of a session in little space, whatever its number of steps."""

from __future__ import annotations

from dataclasses import dataclass, field

_MOST = 128


@dataclass(slots=True)
class LossCurve:
    """Means of the loss over spans of ``every`` steps, the last of them perhaps of fewer.

    There are at most 128 spans: when they are full, each two become one of twice the steps.

        >>> curve = LossCurve()
        >>> for step in range(300):
        ...     curve.add(step)
        >>> curve.every, len(curve.means), curve.means[:2], curve.means[-1]
        (4, 75, [1.5, 5.5], 297.5)
    """

    every: int = 1
    _sums: list[float] = field(default_factory=list)
    _count: int = 0

    def add(self, loss: float) -> None:
        """Add the loss of the next step."""
        if self._count == _MOST * self.every:
            self._sums = [self._sums[i] + self._sums[i + 1] for i in range(0, _MOST, 2)]
            self.every *= 2
        if self._count % self.every == 0:
            self._sums.append(0.0)
        self._sums[-1] += loss
        self._count += 1

    @property
    def means(self) -> list[float]:
        """The mean of each span."""
        whole, rest = divmod(self._count, self.every)
        counts = [self.every] * whole + [rest] * bool(rest)
        return [total / count for total, count in zip(self._sums, counts, strict=True)]
