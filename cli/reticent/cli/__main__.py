"""``python -m reticent.cli``: the command where its script is not on the path."""

from __future__ import annotations

from .main import main

main()
