"""Mistakes that a user can mend: one line each, without a traceback."""

__all__ = ["InputError"]


class InputError(Exception):
    """What was given is wrong; the message names what, where, the value, and the remedy."""
