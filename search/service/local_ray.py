"""A Ray cluster of this machine, for as long as the service lives.

    python -m search.service.local_ray

A process of its own, so that the service can lose Ray and start it again. It says where Ray
listens, and ends when its standard input does, which it does with the service, however that ends.
"""

import os
import secrets
import select
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray

from search.cluster import connected
from search.errors import InputError
from search.service.launcher import UnreachableError

__all__ = ["LocalRay", "main", "with_token"]

_START_SECONDS = 120.0
_STOP_SECONDS = 20.0


class LocalRay:
    """Starts Ray on this machine when it is first needed, and again when it is gone.

    Args:
        log: File for what Ray's keeper says.
        environment: Of Ray's processes.
    """

    def __init__(self, log: Path, environment: Mapping[str, str]) -> None:
        self._log, self._environment = log, dict(environment)
        self._up: _Up | None = None

    def address(self) -> str:
        """Return the address, having started Ray if need be.

        Raises:
            UnreachableError: If it does not start.
        """
        if self._up is None or self._up.process.poll() is not None:
            self._up = self._start()
        return self._up.address

    def close(self) -> None:
        """Stop Ray, if it was started."""
        if self._up is None:
            return
        process = self._up.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._up = None

    def _start(self) -> "_Up":
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "search.service.local_ray"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for the service, which stops it in order
                text=True,
            )
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
        address = process.stdout.readline().strip() if ready else ""
        if not address:
            process.kill()
            process.wait()
            raise UnreachableError(f"Ray does not start on this machine; see {self._log}")
        return _Up(process, address)


@dataclass(frozen=True, slots=True)
class _Up:
    process: subprocess.Popen[str]
    address: str


def with_token(environment: Mapping[str, str], path: Path) -> dict[str, str]:
    """Return an environment in which Ray asks for a token, made if need be.

    What the operator has set about it stays.

    Args:
        environment: To begin with.
        path: File for the token.
    """
    if "RAY_AUTH_MODE" in environment:
        return dict(environment)
    if not path.exists():
        # Nobody else may read it, from its first byte on.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    return {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def main() -> None:
    """Have Ray on this machine until the standard input ends."""
    try:
        with connected(None, dashboard=True, about={"job_name": "hawq serve"}) as where:
            sys.stderr.write(f"{where}\n")
            sys.stdout.write(f"{ray.get_runtime_context().gcs_address}\n")
            sys.stdout.flush()
            sys.stdin.read()
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
