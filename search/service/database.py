"""The database: an index over searches, which can be made again from the store, and tokens."""

from pathlib import Path

from sqlalchemy import (
    Boolean,
    Column,
    Engine,
    Float,
    Index,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from search.errors import InputError

__all__ = ["index_url", "opened", "searches", "tokens"]

_metadata = MetaData()

searches = Table(
    "searches",
    _metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("submitted", Float, nullable=False),
    Column("key_hash", String(64)),
    Column("record", Text, nullable=False),
    UniqueConstraint("owner", "key_hash"),
    Index("by_time", "submitted", "id"),
    Index("by_owner_and_time", "owner", "submitted", "id"),
)

tokens = Table(
    "tokens",
    _metadata,
    Column("id", String(16), primary_key=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("admin", Boolean, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)


def index_url(path: Path, database: str | None) -> str:
    """Return the URL of a store's database: as given, or of a file in its folder."""
    return database or f"sqlite:///{path.resolve() / 'index.db'}"


def opened(url: str) -> Engine:
    """Open a database, and make its tables where they are not there.

    Args:
        url: As SQLAlchemy has it: ``sqlite:////path/index.db``, ``postgresql+psycopg://…``.

    Raises:
        InputError: If it cannot be opened.
    """
    try:
        is_file = make_url(url).get_backend_name() == "sqlite"
        # Without asking first, the next request after a server's restart would fail.
        engine = create_engine(url, pool_pre_ping=not is_file)
        if is_file:
            event.listen(engine, "connect", _as_a_server)
        _metadata.create_all(engine)
        for index in searches.indexes:  # those of tables that an earlier version made
            index.create(engine, checkfirst=True)
    except (ArgumentError, NoSuchModuleError, ImportError, SQLAlchemyError) as error:
        # The URL may hold a password, so it is not repeated.
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise InputError(
            "--database: must be a URL that SQLAlchemy can open, such as "
            f"sqlite:////srv/hawq/index.db, got one that fails: {reason}"
        ) from error
    return engine


def _as_a_server(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    """Let readers go on beside a writer, and writers wait for each other."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()
