"""Text of others where a terminal or a reader of Markdown would obey it, or drown in it."""

import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def inert(markdown: str) -> str:
    """Markdown of our own, which holds no HTML, without what others' names bring into it."""
    return _TAG.sub("&lt;", printable(markdown))


def printable(text: str) -> str:
    """The text with a picture in place of each control character but tab and line feed.

    What colours, erases or retitles a terminal begins with one. Those of ASCII become the picture
    that Unicode has for them (U+2400 and on), the others U+FFFD.
    """
    return _CONTROLS.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code == 0x7F:
        return "\u2421"
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and its end, of some `most` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"
