"""The seam between the service and what runs attempts: processes here, or jobs of a cluster."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from search.service.reconcile import Job
from search.service.record import Record, SearchFolder

__all__ = ["Launcher", "Seen", "UnreachableError"]


class UnreachableError(ConnectionError):
    """What runs attempts does not answer now; it may later."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of an attempt.

    Attributes:
        job: Whether it runs.
        said: Of one that ended, why, where that is known.
    """

    job: Job
    said: str = ""


class Launcher(Protocol):
    """Runs attempts."""

    @property
    def outlives_service(self) -> bool:
        """Whether attempts go on when the service stops."""
        ...

    def launch(self, record: Record, folder: SearchFolder) -> None:
        """Start a record's latest attempt; to start one again that runs does nothing.

        Raises:
            UnreachableError: If it cannot be started now.
        """
        ...

    def stop(self, attempt: str) -> None:
        """Stop an attempt, if it runs; may be called again and again.

        Raises:
            UnreachableError: If it cannot be stopped now.
        """
        ...

    def seen(self) -> Mapping[str, Seen]:
        """Return what is known of attempts, by their ids.

        Raises:
            UnreachableError: If nothing can be known now.
        """
        ...

    def close(self) -> None:
        """Stop what lives no longer than the service."""
        ...
