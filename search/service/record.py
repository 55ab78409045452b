"""A search's folder in the store, and what is written there.

DIR/searches/ID/
    config.json      what was asked; never changes
    record.json      whose it is and how far; only the service writes it
    heartbeat.json   that its driver lives; only the driver writes this, and the next two
    outcome.json     how an attempt ended
    attempts/N.log   what attempt N said
    driver.lock      held by the driver that may write
    run/             the folder of the run
"""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search.config import SearchConfig
from search.errors import other_form
from search.events import Event
from search.folder import write_atomically

__all__ = ["ENDED", "Heartbeat", "Outcome", "Record", "SearchFolder", "State", "StateError"]

State = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
ENDED = frozenset[State]({"succeeded", "failed", "cancelled"})

_LOG_LINES = 20
_LOG_BYTES = 16 << 10


class StateError(ValueError):
    """What is asked of a search does not go with its state."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(_Document):
    """Whose a search is, and how far it is."""

    id: str
    name: str
    owner: str
    submitted: float = Field(description="Seconds since the epoch.")
    state: State = "queued"
    changed: float = Field(description="When the state changed, in seconds since the epoch.")
    reason: str = Field("", description="Why it is in this state, where that is worth a word.")
    log_end: str = Field("", description="The last lines of a failed search's log.")
    attempt: int = Field(0, description="Number of the latest attempt; 0: none yet.")
    failures: int = Field(0, description="Attempts that were lost since a stage was last finished.")
    stages: int = Field(0, description="Most stages that an earlier attempt came past.")
    not_before: float = Field(0, description="When the next attempt may begin.")
    cpus: float = Field(1, description="CPUs that it cannot do without.")
    gpus: float = Field(0, description="GPUs that it cannot do without.")
    key_hash: str | None = Field(None, description="Hash of the Idempotency-Key, if any.")
    body_hash: str = Field("", description="Hash of what was submitted.")

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens unless it is resumed."""
        return self.state in ENDED

    def cancelled(self) -> "Record":
        """Return the record with the wish that it end.

        Raises:
            StateError: If it has ended otherwise.
        """
        match self.state:
            case "queued":
                return self.model_copy(update={"state": "cancelled", "reason": ""})
            case "running":
                return self.model_copy(update={"state": "cancelling", "reason": ""})
            case "cancelling" | "cancelled":
                return self
        raise StateError(
            f"a search must be queued or running to be cancelled, got one that is {self.state}"
        )

    def resumed(self) -> "Record":
        """Return the record with the wish that it go on, and all attempts before it.

        Raises:
            StateError: If it has not ended, or has succeeded.
        """
        if self.state not in {"failed", "cancelled"}:
            raise StateError(
                "a search must have failed or been cancelled to be resumed, "
                f"got one that is {self.state}"
            )
        fresh = {"state": "queued", "reason": "", "log_end": "", "failures": 0, "not_before": 0.0}
        return self.model_copy(update=fresh)

    @property
    def labels(self) -> dict[str, str]:
        """What a cluster is told of the latest attempt, for those who watch its jobs."""
        return {
            "job_name": self.name,  # as the dashboard has it
            "id": self.id,
            "owner": self.owner,
            "attempt": str(self.attempt),
        }

    @property
    def attempt_id(self) -> str:
        """Name of the latest attempt, unique over all searches."""
        return f"{self.id}.a{self.attempt}"


class Heartbeat(_Document):
    """A sign of life of a driver."""

    attempt: int
    beat: int = Field(description="Grows with every beat; clocks of machines may differ.")
    stages: int = Field(description="Stages that it came past, finished ones of before included.")
    host: str
    pid: int
    latest: Event | None = Field(None, description="What happened last.")


class Outcome(_Document):
    """How an attempt ended.

    After ``refused`` the next one would end no better: something that was given is wrong. An
    attempt that dies leaves none.
    """

    attempt: int
    ended: Literal["succeeded", "refused"]
    reason: str = ""


Document = TypeVar("Document", bound=BaseModel)


class SearchFolder:
    """The folder of one search in the store.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return self.path / "run"

    @property
    def events(self) -> Path:
        """What happened in the run."""
        return self.run / "events.jsonl"

    @property
    def driver_lock(self) -> Path:
        """Held by the driver that may write."""
        return self.path / "driver.lock"

    def log(self, attempt: int) -> Path:
        """Return the log of an attempt."""
        return self.path / "attempts" / f"{attempt}.log"

    def log_end(self, attempt: int) -> str:
        """Return the last lines of an attempt's log."""
        path = self.log(attempt)
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-_LOG_LINES:])

    def config(self) -> SearchConfig:
        """Read what was asked."""
        text = (self.path / "config.json").read_text(encoding="utf-8")
        return SearchConfig.model_validate_json(text)

    def record(self) -> Record | None:
        """Read the record; None where there is none, so that there is no search either."""
        return self._read("record.json", Record)

    def heartbeat(self) -> Heartbeat | None:
        """Read the latest sign of life."""
        return self._read("heartbeat.json", Heartbeat)

    def outcome(self) -> Outcome | None:
        """Read how the attempt ended that ended last."""
        return self._read("outcome.json", Outcome)

    def write(self, document: Record | Heartbeat | Outcome) -> None:
        """Write a document, atomically."""
        name = type(document).__name__.lower()
        write_atomically(self.path / f"{name}.json", document.model_dump_json(indent=1))

    def write_config(self, config: SearchConfig) -> None:
        """Write what was asked."""
        write_atomically(self.path / "config.json", config.model_dump_json(indent=1))

    def _read(self, name: str, kind: type[Document]) -> Document | None:
        try:
            return kind.model_validate_json((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            # Only atomic writes go there: another version wrote it, or somebody's editor.
            raise ValueError(
                f"{self.path / name} must be what this version writes, got {other_form(error)}"
            ) from error
