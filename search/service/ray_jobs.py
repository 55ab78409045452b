"""Attempts as jobs of a Ray cluster."""

import shlex
from collections.abc import Mapping

from ray.job_submission import JobStatus, JobSubmissionClient
from requests import RequestException

from search.service.launcher import Seen, UnreachableError
from search.service.reconcile import Job
from search.service.record import Record, SearchFolder

__all__ = ["RayJobs"]

_JOBS: dict[JobStatus, Job] = {
    JobStatus.PENDING: "pending",
    JobStatus.RUNNING: "running",
    JobStatus.STOPPED: "ended",
    JobStatus.FAILED: "ended",
    JobStatus.SUCCEEDED: "ended",
}


class RayJobs:
    """Runs each attempt as a Ray job, which goes on when the service stops.

    The cluster's nodes must see the store under the same path, and have this package.

    Args:
        address: Of the cluster's dashboard, ``http://host:8265``.
        python: Interpreter there.
    """

    outlives_service = True

    def __init__(self, address: str, python: str) -> None:
        self._address, self._python = address, python
        self._client: JobSubmissionClient | None = None

    def launch(self, record: Record, folder: SearchFolder) -> None:
        """Start a record's latest attempt; to start one again that runs does nothing.

        Raises:
            UnreachableError: If the cluster does not answer.
        """
        arguments = [self._python, "-m", "search.service.driver"]
        arguments += [str(folder.path), str(record.attempt), "auto"]
        try:
            if record.attempt_id in self.seen():
                return
            self._asked().submit_job(
                # In place of the shell, so that the driver's parent is Ray's.
                entrypoint=f"exec {shlex.join(arguments)}",
                submission_id=record.attempt_id,
                metadata={
                    "search": record.name,
                    "id": record.id,
                    "owner": record.owner,
                    "attempt": str(record.attempt),
                },
            )
        except (ConnectionError, RequestException, RuntimeError) as error:
            raise self._away(error) from error

    def stop(self, attempt: str) -> None:
        """Ask Ray to stop an attempt; it makes it, a few seconds later.

        Raises:
            UnreachableError: If the cluster does not answer.
        """
        seen = self.seen().get(attempt)
        if seen is None or seen.job == "ended":
            return
        try:
            self._asked().stop_job(attempt)
        except (ConnectionError, RequestException, RuntimeError) as error:
            raise self._away(error) from error

    def seen(self) -> Mapping[str, Seen]:
        """Return what Ray knows of attempts, by their ids.

        Raises:
            UnreachableError: If the cluster does not answer.
        """
        try:
            jobs = self._asked().list_jobs()
        except (ConnectionError, RequestException, RuntimeError) as error:
            raise self._away(error) from error
        return {
            job.submission_id: Seen(_JOBS[job.status], job.message or "")
            for job in jobs
            if job.submission_id is not None
        }

    def close(self) -> None:
        """Leave the jobs to the cluster."""

    def _asked(self) -> JobSubmissionClient:
        if self._client is None:
            self._client = JobSubmissionClient(self._address)
        return self._client

    def _away(self, error: Exception) -> UnreachableError:
        self._client = None
        reason = " ".join(str(error).split())[:200]
        return UnreachableError(f"Ray does not answer at {self._address}: {reason}")
