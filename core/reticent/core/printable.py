"""Showing text that somebody else wrote: on a terminal, in a log, in a file of lines."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""Return ``text`` with every character escaped that a terminal or a log would act upon.

    Without it a sender could move the cursor, name the window or, with the end of a line, write
    lines of its own into a log. Characters in ``keep`` stay as they are.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
