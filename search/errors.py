"""Mistakes that a user can mend: one line each, without a traceback."""

from pydantic import ValidationError

__all__ = ["InputError", "other_form"]


class InputError(Exception):
    """What was given is wrong; the message names what, where, the value, and the remedy."""


def other_form(error: ValidationError, whole: str = "it") -> str:
    """Say what of a file that this program wrote is not as it writes it.

    Args:
        error: Of reading it.
        whole: What all of it is called.
    """
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    return f"another form of {place or whole} ({problem['msg']})"
