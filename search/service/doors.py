"""What routes and pages reach, and who may reach what: the one answer for both."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from search.service.policy import Policy
from search.service.record import Record
from search.service.store import NoSearchError, Store
from search.service.tokens import Caller, TokenRefusedError, Tokens

__all__ = ["Doors", "Inside"]


@dataclass(frozen=True, slots=True)
class Doors:
    """What the routes reach, kept in the application's state as ``doors``.

    Attributes:
        store: The searches.
        tokens: Who may ask; None: everybody, and all are admin.
        policy: What a config may name.
    """

    store: Store
    tokens: Tokens | None
    policy: Policy

    def caller(self, secret: str | None) -> Caller:
        """Return who asks.

        Args:
            secret: The token; None where none was given.

        Raises:
            TokenRefusedError: If it is not good.
        """
        if self.tokens is None:
            return Caller("local", True)
        if secret is None:
            raise TokenRefusedError("a token must be given, got none")
        return self.tokens.caller(secret)

    def owned(self, search: str, caller: Caller) -> Record:
        """Return a search that somebody may see.

        Raises:
            NoSearchError: If there is none; another's is as if it were not there, which is all
                that others need to know.
        """
        record = self.store.get(search)
        if not caller.is_admin and record.owner != caller.name:
            raise NoSearchError(search)
        return record


# Not a function for a thread of its own: it waits for nothing.
async def _doors(request: Request) -> Doors:
    found: Doors = request.app.state.doors
    return found


Inside = Annotated[Doors, Depends(_doors)]
