"""Bearer tokens: who may ask.

A token is shown once, when it is made; its hash is kept. Tokens have 256 random bits, so that a
plain hash is enough: there is no dictionary to try.
"""

import hashlib
import math
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, Row, insert, select, update

from search.errors import InputError
from search.service.database import index_url, opened, tokens

__all__ = ["Caller", "Token", "TokenRefusedError", "Tokens", "opened_tokens"]

_PREFIX = "hawq_"
_GOOD_SECONDS = 1.0
_LONGEST_NAME = 64


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        name: Of the owner of a token.
        is_admin: Whether others' searches are theirs to read and cancel, too.
    """

    name: str
    is_admin: bool


@dataclass(frozen=True, slots=True)
class Token:
    """A token without its secret.

    Attributes:
        id: To revoke it by.
        owner: Who may use it.
        is_admin: Whether it opens others' searches, too.
        created: Seconds since the epoch.
        expires: The same; None: never.
        revoked: When it was; None: it was not.
    """

    id: str
    owner: str
    is_admin: bool
    created: float
    expires: float | None
    revoked: float | None


class TokenRefusedError(PermissionError):
    """A token is unknown, has expired or was revoked."""


class Tokens:
    """The tokens of a store.

    Args:
        engine: Of the store's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Who asks, asks often: a token that was good is so for a second, without the database.
        self._good: dict[str, tuple[Caller, float]] = {}

    def make(
        self, owner: str, *, is_admin: bool = False, seconds: float | None = None
    ) -> tuple[str, Token]:
        """Make a token.

        Args:
            owner: Who may use it.
            is_admin: Whether it opens others' searches, too.
            seconds: How long it is good; None: until it is revoked.

        Returns:
            The secret, which is nowhere kept, and what is.

        Raises:
            InputError: If the owner has no name, or one that a database cannot hold.
        """
        if not (owner.isprintable() and 1 <= len(owner) <= _LONGEST_NAME):
            raise InputError(
                f"NAME: must be 1 to {_LONGEST_NAME} characters that can be printed, got {owner!r}"
            )
        secret = _PREFIX + secrets.token_urlsafe(32)
        now = time.time()
        expires = None if seconds is None else now + seconds
        token = Token(secrets.token_hex(4), owner, is_admin, now, expires, None)
        row = {
            "id": token.id,
            "hash": _hash(secret),
            "owner": owner,
            "admin": is_admin,
            "created": now,
            "expires": expires,
        }
        with self._engine.begin() as connection:
            connection.execute(insert(tokens), row)
        return secret, token

    def caller(self, secret: str) -> Caller:
        """Return who a token is of.

        Raises:
            TokenRefusedError: If it is not good.
        """
        hashed, now = _hash(secret), time.time()
        known, until = self._good.get(hashed, (None, 0.0))
        if known is not None and now < until:
            return known
        self._good.pop(hashed, None)
        with self._engine.connect() as connection:
            row = connection.execute(select(tokens).where(tokens.c.hash == hashed)).one_or_none()
        if row is None:
            raise TokenRefusedError("the token is not known")
        if row.revoked is not None:
            raise TokenRefusedError("the token was revoked")
        if row.expires is not None and row.expires <= now:
            raise TokenRefusedError("the token has expired")
        found = Caller(row.owner, row.admin)
        self._good[hashed] = found, min(now + _GOOD_SECONDS, row.expires or math.inf)
        return found

    def revoke(self, token: str) -> bool:
        """Revoke a token by its id; tell whether there was one to revoke.

        Another process may take it for good for a second more.
        """
        with self._engine.begin() as connection:
            changed = connection.execute(
                update(tokens)
                .where(tokens.c.id == token, tokens.c.revoked.is_(None))
                .values(revoked=time.time())
            )
        self._good.clear()
        return changed.rowcount > 0

    def all(self) -> list[Token]:
        """Return every token ever made, the oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(tokens).order_by(tokens.c.created)).all()
        return [_token(row) for row in rows]


def _token(row: Row[tuple[object, ...]]) -> Token:
    return Token(row.id, row.owner, row.admin, row.created, row.expires, row.revoked)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


@contextmanager
def opened_tokens(path: Path, database: str | None) -> Iterator[Tokens]:
    """Open the tokens of a store, whether it is served or not.

    Args:
        path: The store's folder.
        database: URL of its index; None: a file in the folder.

    Raises:
        InputError: If the database cannot be opened.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = opened(index_url(path, database))
    try:
        yield Tokens(engine)
    finally:
        engine.dispose()
