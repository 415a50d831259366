"""Where the tokens of a step go, for a terminal: a line per mixture layer with a cell per expert.

Letters: E experts.
"""

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, ConsoleOptions
from rich.text import Text

NOTHING, LEVELS = "·", "▁▂▃▄▅▆▇█"
COLOURS = ("blue", "cyan", "green", "yellow", "red")


class RoutingView:
    """Renders the newest load of every expert, and the newest churn of every mixture layer.

    Args:
        layers: the model's mixture layers.
        num_experts: E.
    """

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self._layers, self._num_experts = layers, num_experts
        self._loads: dict[int, list[float]] = {}
        self._churn: dict[int, float] = {}

    def read(self, row: Mapping[str, float]) -> None:
        """Take what a row of `metrics.jsonl` says of the routing, if anything."""
        for layer in self._layers:
            keys = [f"router/layer_{layer}_expert_{e}_frac" for e in range(self._num_experts)]
            if keys[0] in row:
                self._loads[layer] = [row[key] for key in keys]
            if f"eval/layer_{layer}_churn" in row:
                self._churn[layer] = row[f"eval/layer_{layer}_churn"]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        label = max((len(f"layer {layer}  ") for layer in self._layers), default=0)
        room = max(1, options.max_width - label)
        for layer, loads in self._loads.items():
            even = 1 / len(loads)
            starts = range(0, len(loads), room)
            lines = [strip(loads[start : start + room], even) for start in starts]
            about = f"  most {max(loads):.0%}"
            if layer in self._churn:
                about += f"  churn {self._churn[layer]:.1%}"
            if len(lines[-1]) + len(about) > room:
                lines.append(Text())
            lines[-1].append(about[:room], style="dim")
            for place, line in enumerate(lines):
                start = "" if place else f"layer {layer}"
                yield Text(start.ljust(label), no_wrap=True, overflow="crop") + line


def strip(loads: Sequence[float], even: float) -> Text:
    """A cell for each expert's share of a layer's assignments; `even` is 1 / E.

    An even share is half as high as a cell; from twice of it on a cell is full. Warmer is more, by
    `COLOURS` from 0.25, 0.75, 1.5 and 2.5 times even on. An expert without tokens is a dot.
    """
    found = Text(no_wrap=True, overflow="crop")
    for load in loads:
        times = load / even
        level = min(len(LEVELS) - 1, int(times * len(LEVELS) / 2))
        colour = COLOURS[bisect((0.25, 0.75, 1.5, 2.5), times)]
        found.append(LEVELS[level] if load > 0 else NOTHING, style=colour)
    return found
