"""A report as one HTML file that needs nothing else: no network, no other file, no server.

Whatever comes from the repository is data in a JSON element that cannot end early, and the page shows it as text alone.
A content security policy lets nothing run or load but the two scripts and the style that are named by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from castore.errors import PackageMissing
from castore.report.collect import Report, as_json

_EXACT = 1 << 53  # up to here a browser's numbers hold every integer


def page(report: Report) -> str:
    """The report as HTML. PackageMissing when plotly isn't installed."""
    style, script, charts = _own("page.css"), _own("page.js"), charts_script()
    # styles that the charts' code would make, which it may not: it looks for elements with these ids first, puts rules
    # into the one, and takes the others, those of maps, as made
    ids = ["plotly.js-style-global", *re.findall(r'document\.getElementById\("([0-9a-f]{64})"\)', charts)]
    pieces = {
        "policy": "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hash(charts)} {_hash(script)}",
                f"style-src {_hash(style)} {_hash('')}",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
        "style": style,
        "styles": "".join(f'<style id="{own}"></style>' for own in ids),
        "charts": charts,
        "script": script,
        "data": embedded(page_data(report)),
    }
    # in one pass: what was put in is not looked at again
    return re.sub(r"\{\{(\w+)\}\}", lambda found: pieces[found[1]], _own("page.html"))


def charts_script() -> str:
    """The code that draws charts, of the package plotly. PackageMissing when that isn't installed."""
    try:
        file = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
        return file.read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise PackageMissing("a report as HTML", "plotly", "report") from error


def embedded(value: Any) -> str:
    """``value`` as JSON of plain ASCII that HTML can't take for anything else, such as the end of the element."""
    text = msgspec.json.encode(value).decode()
    return re.sub("[^ -~]|[<>&]", lambda found: _escaped(found[0]), text)


def _escaped(one: str) -> str:
    return f"\\u{ord(one):04x}" if one in "<>&" else json.dumps(one)[1:-1]


def page_data(report: Report) -> dict[str, Any]:
    """What the page shows: the report's JSON, and what of each manifest isn't in it, equal values once.

    ``manifests`` has of each checkpoint the places of its config and of each of its info's values in ``values``.
    """
    places: dict[bytes, int] = {}
    values: list[Any] = []

    def place(value: Any) -> int:
        key = msgspec.json.encode(value, order="sorted")
        if key not in places:
            places[key] = len(values)
            values.append(_exact(value))
        return places[key]

    manifests = []
    for one in report.checkpoints:
        found = one.entry.manifest
        manifests.append([found.version, place(found.config), [[key, place(item)] for key, item in found.info.items()]])
    shown = _exact(as_json(report))
    return {**shown, "values": values, "manifests": manifests}


def _exact(value: Any) -> Any:
    """JSON values with integers that a browser would round as text."""
    if isinstance(value, Mapping):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    if isinstance(value, int) and abs(value) > _EXACT:
        return str(value)
    return value


def _own(name: str) -> str:
    return (importlib.resources.files("castore.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
