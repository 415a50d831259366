"""Consoles that show what others wrote: neither its markup nor its control characters act."""

from collections.abc import Iterator
from typing import Any

import rich.console
from rich.segment import Segment

from moe_emergence.printable import printable


class Console(rich.console.Console):
    """rich's, without markup and emoji codes in strings, and with `printable` text only.

    Args:
        options: of rich's.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})
        self.push_render_hook(_PrintableOnly())


class _PrintableOnly(rich.console.RenderHook):
    def process_renderables(
        self, renderables: list[rich.console.ConsoleRenderable]
    ) -> list[rich.console.ConsoleRenderable]:
        return [_Printable(one) for one in renderables]


class _Printable:
    def __init__(self, shown: rich.console.ConsoleRenderable) -> None:
        self.shown = shown

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> Iterator[Segment]:
        for segment in console.render(self.shown, options):
            if segment.control is None:
                segment = segment._replace(text=printable(segment.text))
            yield segment
