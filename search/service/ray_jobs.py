"""Attempts as jobs of a Ray cluster."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from requests import RequestException, Response

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
        answer_seconds: To wait for an answer of the dashboard.
    """

    outlives_service = True

    def __init__(self, address: str, python: str, *, answer_seconds: float = 30) -> None:
        self._address, self._python, self._answer_seconds = address, python, answer_seconds
        self._client: _Client | None = None

    def launch(self, record: Record, folder: SearchFolder) -> None:
        """Start a record's latest attempt; to start one again that runs does nothing.

        Raises:
            UnreachableError: If the cluster does not answer.
        """
        if record.attempt_id in self.seen():
            return
        arguments = [self._python, "-m", "search.service.driver"]
        arguments += [str(folder.path), str(record.attempt), "auto"]
        with self._asked() as ray:
            ray.submit_job(
                # In place of the shell, so that the driver's parent is Ray's.
                entrypoint=f"exec {shlex.join(arguments)}",
                submission_id=record.attempt_id,
                metadata=record.labels,
            )

    def stop(self, attempt: str) -> None:
        """Ask Ray to stop an attempt; it makes it, a few seconds later.

        Raises:
            UnreachableError: If the cluster does not answer.
        """
        seen = self.seen().get(attempt)
        if seen is None or seen.job == "ended":
            return
        with self._asked() as ray:
            ray.stop_job(attempt)

    def seen(self) -> Mapping[str, Seen]:
        """Return what Ray knows of attempts, by their ids.

        Raises:
            UnreachableError: If the cluster does not answer.
        """
        with self._asked() as ray:
            jobs = ray.list_jobs()
        return {
            job.submission_id: Seen(_JOBS[job.status], job.message or "")
            for job in jobs
            if job.submission_id is not None
        }

    def close(self) -> None:
        """Leave the jobs to the cluster."""

    @contextmanager
    def _asked(self) -> Iterator["_Client"]:
        """Lend a client, a new one after a failure: the cluster may be another by then."""
        try:
            if self._client is None:
                self._client = _Client(self._address, self._answer_seconds)
            yield self._client
        except (AuthenticationError, ConnectionError, RequestException, RuntimeError) as error:
            self._client = None
            reason = " ".join(str(error).split())[:200]
            raise UnreachableError(f"Ray does not answer at {self._address}: {reason}") from error


class _Client(JobSubmissionClient):
    """Waits for an answer, but not for ever, as it would for a head that is cut off."""

    def __init__(self, address: str, answer_seconds: float) -> None:
        self._answer_seconds = answer_seconds
        super().__init__(address)

    def _do_request(self, method: str, endpoint: str, **asked: Any) -> Response:
        return super()._do_request(method, endpoint, timeout=self._answer_seconds, **asked)
