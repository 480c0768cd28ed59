"""Sizes, times and numbers formatted for people, and untrusted text made safe to print. Pure."""

from __future__ import annotations

from datetime import timedelta

from castore.errors import printable

__all__ = ["escape_markdown", "format_age", "format_number", "format_size", "printable"]


def format_size(count: float) -> str:
    """Format a number of bytes in decimal units.

    >>> format_size(3_800_000)
    '3.8 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_age(span: timedelta) -> str:
    """Format a time span in its largest unit; a negative one as ``0 s``.

    >>> format_age(timedelta(hours=3, minutes=5))
    '3 h'
    """
    seconds = max(0.0, span.total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


_PLAIN = " .,;/'\"=%?-"


def escape_markdown(text: str) -> str:
    """Escape ``text`` so that none of it is read as Markdown, HTML or the end of a table cell.

    >>> escape_markdown("a|b")
    'a&#124;b'
    """
    return "".join(
        character if character.isalnum() or character in _PLAIN else f"&#{ord(character)};"
        for character in printable(text)
    )


def format_number(value: float | None) -> str:
    """Format a number with four decimals, a very large one with four digits, None as ``-``.

    >>> format_number(2.31), format_number(None)
    ('2.3100', '-')
    """
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
