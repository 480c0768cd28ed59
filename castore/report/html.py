"""A report as one HTML file that needs nothing else: no network, no other file, no server.

Everything from the repository is data in a JSON element that it cannot end early, and the page shows it as text only.
A content security policy lets nothing run or load but the two scripts and the styles that it names by their hashes.
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

from castore.report.as_json import report_as_json
from castore.report.collect import Report

CHARTS = "plotly-basic.min.js"
"""What draws the charts: the npm package plotly.js-basic-dist-min 4.1.1, as it is. All of plotly takes 3.6 MB more."""

_MAX_EXACT = 1 << 53  # a browser's numbers hold every integer up to this one


def report_as_html(report: Report, stamp: str = "") -> str:
    """Return the report as an HTML page. One that is served with a ``stamp`` reloads itself when that has changed."""
    style, script, charts = map(_resource, ("page.css", "page.js", CHARTS))
    # The policy forbids the charts' code to make styles of its own. It first looks for elements with these ids: it puts
    # its rules into the first one, and takes the others, which are for maps, as already made.
    style_ids = ["plotly.js-style-global", *re.findall(r'document\.getElementById\("([0-9a-f]{64})"\)', charts)]
    pieces = {
        "policy": "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hash(charts)} {_hash(script)}",
                f"style-src {_hash(style)} {_hash('')}",
                "img-src data:",
                *(["connect-src 'self'"] if stamp else []),
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
        "style": style,
        "styles": "".join(f'<style id="{style_id}"></style>' for style_id in style_ids),
        "charts": charts,
        "script": script,
        "data": embedded({**page_data(report), "stamp": stamp}),
    }
    # in one pass, so that what was put in is not searched for placeholders
    return re.sub(r"\{\{(\w+)\}\}", lambda placeholder: pieces[placeholder[1]], _resource("page.html"))


def embedded(value: Any) -> str:
    r"""Return ``value`` as ASCII JSON that HTML cannot take for markup, such as the end of the element it stands in.

    >>> print(embedded("</script>"))
    "\u003c/script\u003e"
    """
    text = msgspec.json.encode(value).decode()
    return re.sub("[^ -~]|[<>&]", lambda match: _escaped(match[0]), text)


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}" if character in "<>&" else json.dumps(character)[1:-1]


def page_data(report: Report) -> dict[str, Any]:
    """Return what the page shows: the report's JSON, and the config and info of every manifest, equal values once.

    ``values`` lists the distinct values. ``manifests`` has (version, place of the config, (name, place) pairs of the
    info) for each checkpoint, where a place is a position in ``values``.
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
    for checkpoint in report.checkpoints:
        manifest = checkpoint.entry.manifest
        info = [[key, place(value)] for key, value in manifest.info.items()]
        manifests.append([manifest.version, place(manifest.config), info])
    return {**_exact(report_as_json(report)), "values": values, "manifests": manifests}


def _exact(value: Any) -> Any:
    """Return JSON values in which integers that a browser would round are text."""
    if isinstance(value, Mapping):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    if isinstance(value, int) and abs(value) > _MAX_EXACT:
        return str(value)
    return value


def _resource(name: str) -> str:
    return (importlib.resources.files("castore.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
