"""Text from clients and errors, made fit for one line of a log."""

from __future__ import annotations

MAX_REASON = 300
"""Characters of a reason that go to the log."""


def reason(error: Exception) -> str:
    """Return an error's first line, fit for a log."""
    if isinstance(error, KeyError):
        return printable(f"{error} is missing")
    return printable(str(error).splitlines()[0] if str(error).strip() else type(error).__name__)


def printable(text: str) -> str:
    """Return the beginning of a client's text, without control characters."""
    return "".join(each if each.isprintable() else "?" for each in text[:MAX_REASON])
