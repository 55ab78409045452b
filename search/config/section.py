"""What every section of a config is made of."""

import difflib
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Bits", "Positive", "Section", "Share", "suggestion"]

Bits = Annotated[int, Field(ge=1, le=8)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen, and unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def suggestion(key: str, known: Mapping[str, object]) -> str:
    """Name the known key that is nearest to a mistaken one, or all of them."""
    near = difflib.get_close_matches(key, known, 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
