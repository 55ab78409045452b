"""Files that grow, as they are read by those who watch."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from pydantic_core import from_json
from sse_starlette import ServerSentEvent

__all__ = ["follow", "follow_events", "whole_lines"]

_CHUNK_BYTES = 256 << 10
_LOOK_SECONDS = 0.3


def whole_lines(path: Path, offset: int) -> list[tuple[int, bytes]]:
    """Return lines that begin after so many bytes, each with the number of bytes at its end.

    A last line that is not at its end yet is left out, and so is the rest of one that ``offset``
    is inside of.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, offset - 1))
            skipped = file.readline() if offset else b""
            if offset and not skipped.endswith(b"\n"):
                return []
            position = file.tell()
            lines = file.read(_CHUNK_BYTES).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        if line.endswith(b"\n"):
            position += len(line)
            found.append((position, line[:-1]))
    return found


async def follow(path: Path, offset: int, has_ended: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Yield what is in a file after so many bytes, and what is added until all has ended."""
    while True:
        # Asked before the file is read: then nothing that was written before the end is missed.
        ended, chunk = await asyncio.to_thread(lambda at: (has_ended(), _read(path, at)), offset)
        if chunk:
            offset += len(chunk)
            yield chunk
        elif ended:
            return
        else:
            await asyncio.sleep(_LOOK_SECONDS)


async def follow_events(
    path: Path, offset: int, end: Callable[[], str | None]
) -> AsyncIterator[bytes]:
    """Yield a run's events as they come, as messages, each with its place in the file as its id.

    Those that are there at once are sent at once: most of what a message costs is its sending.

    Args:
        path: Of ``events.jsonl``.
        offset: Id of the last event that was seen; 0: from the beginning.
        end: Returns what to say at the end; None while there is more to come.
    """
    while True:
        last, lines = await asyncio.to_thread(lambda at: (end(), whole_lines(path, at)), offset)
        # As ServerSentEvent would write them one by one, which is a third of what a request costs.
        messages = [b"id: %d\r\ndata: %s\r\n\r\n" % told for told in lines if _is_json(told[1])]
        if messages:
            yield b"".join(messages)
        if lines:
            offset = lines[-1][0]
        elif last is not None:
            yield ServerSentEvent(data=last, event="end").encode()
            return
        else:
            await asyncio.sleep(_LOOK_SECONDS)


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(_CHUNK_BYTES)
    except FileNotFoundError:
        return b""


def _is_json(line: bytes) -> bool:
    """Tell whether a line is whole: a kill may have cut one short."""
    try:
        from_json(line)
    except ValueError:
        return False
    return True
