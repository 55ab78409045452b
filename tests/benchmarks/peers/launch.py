"""Environments for the peers, and one process a measurement in them."""

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Peer", "launch", "recorded"]

ROOT = Path(__file__).parents[3]
SECONDS = 1800  # of one process; a method that takes longer is reported as such

# All run on this project's own torch, the newest, so an environment holds only what it lacks.
ENVIRONMENTS = {
    "hawq": (),
    "pyhessian": ("pyhessian==0.1",),
    "curvlinops": ("curvlinops-for-pytorch==3.0.1", "backpack-for-pytorch==1.7.1"),
    "nncf": ("nncf==2.19.0",),
    "backpack": ("backpack-for-pytorch==1.7.1",),
}


@dataclass(frozen=True, slots=True)
class Peer:
    """One method of one peer, and how much of it to run.

    Attributes:
        environment: Key of ``ENVIRONMENTS``.
        module: Of tests.benchmarks.peers.
        method: As the module calls it.
        batch: Images a batch.
        steps: In one round.
        rounds: At most; None for all.
        slow: Whether it runs only when asked for.
    """

    environment: str
    module: str
    method: str
    batch: int
    steps: int
    rounds: int | None = None
    slow: bool = False

    @property
    def name(self) -> str:
        """What tables and files call it."""
        beside = self.environment not in ("hawq", self.module.removeprefix("via_"))
        inside = f" in {self.environment}'s" if beside else ""
        return f"{self.module.removeprefix('via_')}{inside}: {self.method}"

    @property
    def stem(self) -> str:
        """Start of the names of its records."""
        return self.name.replace(": ", "-").replace(" ", "_")


def launch(peer: Peer, problem: Path, *, seed: int, folder: Path) -> None:
    """Measure one method in a fresh process; a failure is a record with its reason.

    Args:
        peer: The method.
        problem: File of the problem.
        seed: Of its probes.
        folder: Where the record goes.
    """
    out = folder / f"{peer.stem}_{seed}.json"
    command = [
        _interpreter(peer.environment), "-m", f"tests.benchmarks.peers.{peer.module}", peer.method,
        "--problem", problem, "--batch", str(peer.batch), "--steps", str(peer.steps),
        "--seed", str(seed), "--out", out,
    ]  # fmt: skip
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        # A waiting thread sleeps: one that spins uses CPU-seconds whenever others use the machine.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    reason = None
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, timeout=SECONDS,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            reason = last[0] if last else f"exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"took more than {SECONDS} s"
    if reason is not None:
        out.write_text(json.dumps({"failed": reason}))


def recorded(peer: Peer, folder: Path) -> list[dict[str, Any]]:
    """Read what ``launch`` left of a method, failures too, in the order of the seeds."""
    paths = [path for path in folder.glob("*.json") if path.stem.rpartition("_")[0] == peer.stem]
    paths.sort(key=lambda path: int(path.stem.rpartition("_")[2]))
    return [json.loads(path.read_text()) for path in paths]


def _interpreter(environment: str) -> Path:
    """Return the Python of an environment, made first where it is missing or another."""
    requirements = ENVIRONMENTS[environment]
    if not requirements:
        return Path(sys.executable)
    folder = ROOT / "build" / "bench" / "env" / environment
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists() and ready.read_text() == " ".join(requirements):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    # What this project has comes after what the environment has: torch is not installed twice.
    library = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (library / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "-qq", *requirements], check=True)
    ready.write_text(" ".join(requirements))
    return python
