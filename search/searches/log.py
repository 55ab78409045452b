"""A search's evaluations on disk, a line each as they come."""

import json
from collections.abc import Mapping
from pathlib import Path

from hawq.allocation import Allocation
from hawq.space import Space
from search.evaluate import Evaluation
from search.searched import ScoredAllocation

__all__ = ["EvaluationLog"]


class EvaluationLog:
    """A search's evaluations on disk, one a line after a first line of what they depend on.

    A line that was cut short by a crash, and lines made from something else, count as not there.

    Args:
        path: The file.
        inputs: Hash of everything that the evaluations depend on.
        space: What they choose from.
    """

    def __init__(self, path: Path, inputs: str, space: Space) -> None:
        self.path = path
        self._names, self._fingerprint = space.names, space.fingerprint
        header = json.dumps({"inputs": inputs, "space": self._fingerprint})
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        kept = lines[1:-1] if lines and lines[0] == header else []
        if not lines or lines[0] != header or lines[-1]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in [header, *kept]), encoding="utf-8")
        self.found: list[ScoredAllocation] = []
        self.episodes = 0
        self.fidelity = ""
        self._digits: list[str] = []
        for line in kept:
            self._read(json.loads(line))

    def _read(self, line: Mapping[str, object]) -> None:
        entry = dict(line)
        self.episodes += int(str(entry.pop("proposals")))
        self._digits.append(str(entry.pop("bits")))
        self.fidelity = str(entry.pop("fidelity"))
        self.found.append(ScoredAllocation.model_validate(entry))

    def add(self, found: ScoredAllocation, evaluation: Evaluation) -> None:
        """Append an evaluation."""
        more = {
            "proposals": evaluation.proposals,
            "fidelity": evaluation.fidelity,
            # A digit a group: no width is above 8.
            "bits": "".join(map(str, evaluation.allocation.bits)),
        }
        line = found.model_dump() | more
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._read(line)

    def allocation(self, index: int) -> Allocation:
        """Return an evaluation's allocation."""
        bits = tuple(map(int, self._digits[index]))
        return Allocation(self._names, bits, self._fingerprint)
