"""Sizes, times and numbers as people read them, and text from elsewhere made safe to print. Pure."""

from __future__ import annotations

from datetime import timedelta

from castore.errors import printable

__all__ = ["escape_markdown", "format_age", "format_number", "format_size", "printable"]


def format_size(count: float) -> str:
    """Bytes in decimal units, as disks and networks are sold: ``3.8 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_age(span: timedelta) -> str:
    """The largest whole unit of a time span: ``3 h``; a time in the future is ``0 s``."""
    seconds = max(0.0, span.total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


_PLAIN = " .,;/'\"=%?-"


def escape_markdown(text: str) -> str:
    """``text`` as text: nothing in it is taken for Markdown, HTML or the end of a table's cell."""
    return "".join(one if one.isalnum() or one in _PLAIN else f"&#{ord(one)};" for one in printable(text))


def format_number(value: float | None) -> str:
    """Four places, or four digits of what is very large; ``-`` for nothing."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
