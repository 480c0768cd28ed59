"""For mkdocs: a page that links to a file beside docs/ links to where the code is read, if that is known.

CASTORE_CODE_URL, such as https://github.com/you/castore/blob/main, is where; without it the text stays.
"""

from __future__ import annotations

import os
import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with its links into the repository replaced."""
    base = os.environ.get("CASTORE_CODE_URL", "").rstrip("/")
    return _OUTSIDE.sub(lambda link: f"[{link[1]}]({base}/{link[2]})" if base else link[1], markdown)
