"""Errors that end a launch before it serves: a launch that cannot work, files that cannot be loaded."""

from __future__ import annotations


class UsageError(ValueError):
    """A launch that cannot work; one line names the flag, what was given and what is allowed."""


class LoadError(RuntimeError):
    """Files that cannot be loaded or do not fit each other; one line says which, and what was expected."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its type when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
