"""All searches: a folder each, and an index to list them by.

A folder's ``record.json`` is the truth. The index is written after it and made again from the
folders when the service starts, so that a death between the two is mended.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sqlalchemy import delete, insert, select

from search.config import SearchConfig
from search.service.database import index_url, opened, searches
from search.service.demand import demand
from search.service.record import ENDED, Heartbeat, Record, SearchFolder, State

__all__ = ["KeyReusedError", "NoSearchError", "Page", "SearchActiveError", "Store"]

_log = logging.getLogger("hawq.service")

_MOST_KNOWN = 4096
_ID = re.compile(r"[a-z0-9]{12}")


class NoSearchError(LookupError):
    """No search has this id."""


class KeyReusedError(ValueError):
    """An Idempotency-Key came again with another search."""


class SearchActiveError(ValueError):
    """A search cannot be deleted before it has ended."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some searches, the latest first.

    Attributes:
        records: Of these searches.
        after: The id to go on after; None at the end.
    """

    records: list[Record]
    after: str | None


class Store:
    """Searches in folders, with an index.

    One process writes to it, from any of its threads; drivers write in their own folders.

    Args:
        path: The folder of all.
        database: URL of the index; None for ``index.db`` in the folder.

    Raises:
        InputError: If the database cannot be opened.
    """

    def __init__(self, path: Path, database: str | None = None) -> None:
        self.path = path.resolve()
        self._searches = self.path / "searches"
        self._searches.mkdir(parents=True, exist_ok=True)
        self.engine = opened(index_url(self.path, database))
        self._lock = threading.RLock()

    def close(self) -> None:
        """Leave the database."""
        self.engine.dispose()

    def folder(self, search: str) -> SearchFolder:
        """Return a search's folder.

        Raises:
            NoSearchError: If there is no such search.
        """
        folder = SearchFolder(self._searches / search)
        if not _ID.fullmatch(search) or not (folder.path / "record.json").exists():
            raise NoSearchError(search)
        return folder

    def submit(
        self, config: SearchConfig, *, owner: str, name: str, key: str | None = None
    ) -> tuple[Record, bool]:
        """Keep a search to be run.

        Args:
            config: What to search.
            owner: Whose it is.
            name: For people; need not be unique.
            key: Of two submissions of an owner with one key, the second is the first.

        Returns:
            The record, and whether it is new.

        Raises:
            KeyReusedError: If the key came with another config or name before.
        """
        key_hash = None if key is None else _hash(key)
        body_hash = _hash(name + config.model_dump_json())
        with self._lock:
            known = self._with_key(owner, key_hash)
            if known is not None:
                if known.body_hash != body_hash:
                    raise KeyReusedError(f"the key belongs to search {known.id}")
                return known, False
            now = time.time()
            cpus, gpus = demand(config)
            record = Record(
                id=secrets.token_hex(6),
                name=name,
                owner=owner,
                submitted=now,
                changed=now,
                cpus=cpus,
                gpus=gpus,
                key_hash=key_hash,
                body_hash=body_hash,
            )
            folder = SearchFolder(self._searches / record.id)
            folder.write_config(config)
            self._write(folder, record)
        return record, True

    def get(self, search: str) -> Record:
        """Return a search's record.

        Raises:
            NoSearchError: If there is no such search.
        """
        record = self.folder(search).record()
        if record is None:  # deleted in this moment
            raise NoSearchError(search)
        return record

    def heartbeat(self, search: str) -> Heartbeat | None:
        """Return a driver's latest sign of life; None without one that this version can read."""
        # A Path's own way takes twice as long, and a list asks for hundreds.
        path = f"{self._searches}/{search}"
        try:
            status = os.stat(f"{path}/heartbeat.json")
        except FileNotFoundError:
            return None
        return _heartbeat(path, status.st_ino, status.st_mtime_ns)

    def change(self, search: str, how: Callable[[Record], Record]) -> Record:
        """Change a record; ``how`` sees it as it is now, and may refuse by an exception.

        Raises:
            NoSearchError: If there is no such search.
        """
        with self._lock:
            old = self.get(search)
            new = how(old)
            if new.state != old.state:
                new = new.model_copy(update={"changed": time.time()})
            if new != old:
                self._write(self.folder(search), new)
            return new

    def page(
        self,
        *,
        owner: str | None = None,
        state: State | None = None,
        name: str | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> Page:
        """List searches, the latest first.

        Args:
            owner: Of this one alone; None: of all.
            state: In this state alone.
            name: Of this name alone.
            after: Go on after this search.
            limit: So many at most.

        Raises:
            NoSearchError: If ``after`` is no search.
        """
        query = select(searches.c.record).order_by(
            searches.c.submitted.desc(), searches.c.id.desc()
        )
        for column, value in ((searches.c.owner, owner), (searches.c.state, state)):
            query = query if value is None else query.where(column == value)
        if name is not None:
            query = query.where(searches.c.name == name)
        if after is not None:
            last = self.get(after)
            same_time = (searches.c.submitted == last.submitted) & (searches.c.id < after)
            query = query.where((searches.c.submitted < last.submitted) | same_time)
        with self.engine.connect() as connection:
            found = connection.scalars(query.limit(limit + 1)).all()
        records = [_record(text) for text in found[:limit]]
        return Page(records, records[-1].id if len(found) > limit else None)

    def active(self) -> list[Record]:
        """Return the searches that have not ended, the oldest first."""
        query = (
            select(searches.c.record)
            .where(searches.c.state.not_in(ENDED))
            .order_by(searches.c.submitted, searches.c.id)
        )
        with self.engine.connect() as connection:
            found = connection.scalars(query).all()
        return [_record(text) for text in found]

    def delete(self, search: str) -> None:
        """Delete a search and all that it found.

        Raises:
            NoSearchError: If there is no such search.
            SearchActiveError: If it has not ended.
        """
        with self._lock:
            if not self.get(search).has_ended:
                raise SearchActiveError(search)
            # Without its record it is gone, whatever becomes of the rest.
            (self.folder(search).path / "record.json").unlink()
            with self.engine.begin() as connection:
                connection.execute(delete(searches).where(searches.c.id == search))
        shutil.rmtree(self._searches / search, ignore_errors=True)

    def reindex(self) -> None:
        """Make the index again from the folders, and clear away what a death left half-done."""
        with self._lock:
            records = list(self._records())
            with self.engine.begin() as connection:
                connection.execute(delete(searches))
                if records:
                    connection.execute(insert(searches), [_row(record) for record in records])

    def _records(self) -> Iterator[Record]:
        for path in sorted(self._searches.iterdir()):
            try:
                record = SearchFolder(path).record()
            except ValueError as error:
                _log.warning("search %s is left out: %s", path.name, error)
                continue
            if record is not None:
                yield record
            elif _ID.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _with_key(self, owner: str, key_hash: str | None) -> Record | None:
        if key_hash is None:
            return None
        query = select(searches.c.id).where(
            searches.c.owner == owner, searches.c.key_hash == key_hash
        )
        with self.engine.connect() as connection:
            found = connection.scalar(query)
        return None if found is None else self.get(found)

    def _write(self, folder: SearchFolder, record: Record) -> None:
        folder.write(record)
        with self.engine.begin() as connection:
            connection.execute(delete(searches).where(searches.c.id == record.id))
            connection.execute(insert(searches), _row(record))


@lru_cache(maxsize=_MOST_KNOWN)
def _record(text: str) -> Record:
    """Read a record, once for all lists that it is in."""
    return Record.model_validate_json(text)


@lru_cache(maxsize=_MOST_KNOWN)
def _heartbeat(path: str, inode: int, modified: int) -> Heartbeat | None:
    """Read a heartbeat, once for all who ask; a new one is another file."""
    del inode, modified  # they are there for the cache alone
    with suppress(ValueError):  # who looks after the search says so
        return SearchFolder(Path(path)).heartbeat()
    return None


def _row(record: Record) -> dict[str, object]:
    columns = record.model_dump(include={"id", "owner", "name", "state", "submitted", "key_hash"})
    return columns | {"record": record.model_dump_json()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
