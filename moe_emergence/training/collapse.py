"""Collapse detector: one expert takes most of a layer, check after check."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Collapse:
    """An expert that has been above the threshold for the whole streak."""

    step: int
    layer: int
    expert: int
    fraction: float


class CollapseDetector:
    """Reports a collapse when an expert's share of its layer's assignments exceeds `threshold` in
    `checks_in_a_row` consecutive checks.
    """

    def __init__(self, threshold: float, checks_in_a_row: int) -> None:
        self.threshold = threshold
        self.checks_in_a_row = checks_in_a_row
        self._streaks: dict[str, int] = {}

    def check(self, step: int, fractions: Mapping[int, Sequence[float]]) -> Collapse | None:
        """Look at the fractions (E,) of every layer; the worst collapse if there is one."""
        above = {
            (layer, expert): fraction
            for layer, layer_fractions in fractions.items()
            for expert, fraction in enumerate(layer_fractions)
            if fraction > self.threshold
        }
        self._streaks = {
            f"{layer}.{expert}": self._streaks.get(f"{layer}.{expert}", 0) + 1
            for layer, expert in above
        }
        collapsed = [
            Collapse(step, layer, expert, fraction)
            for (layer, expert), fraction in above.items()
            if self._streaks[f"{layer}.{expert}"] >= self.checks_in_a_row
        ]
        return max(collapsed, key=lambda c: c.fraction, default=None)

    def state_dict(self) -> dict[str, int]:
        """The running streaks, by "layer.expert"."""
        return dict(self._streaks)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue the streaks of `state_dict`."""
        self._streaks = dict(state)
