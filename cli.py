"""The `castore` command of a checkout that isn't installed: ``python cli.py log`` is ``castore log``.

The program itself is `castore/__main__.py`. It can't be this file: installed, a module named `cli` would be hidden by
any other `cli.py` on the path.
"""

from __future__ import annotations

from castore.__main__ import main

if __name__ == "__main__":
    main()
