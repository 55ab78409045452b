"""Finished units of an estimation on disk: for whoever goes on with it, and for those who watch."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hawq.curvature import UnitSums

__all__ = ["UnitFile", "read_units"]


class UnitFile:
    """Finished units on disk, one JSON line each, under a line that names their inputs.

    Args:
        path: The file.
        inputs: Hash of what the units depend on; units of other inputs are discarded.
    """

    def __init__(self, path: Path, inputs: str) -> None:
        self._path, self._inputs = path, inputs

    def read(self, sites: Sequence[str] = ()) -> Iterator[tuple[int, UnitSums]]:
        """Yield the units; a line cut short by a crash is left out.

        Args:
            sites: Names of the first groups, which a new file has in its first line for others who
                read it.
        """
        lines = self._path.read_text().split("\n") if self._path.exists() else []
        # An earlier version's line has no sites: its units are as good.
        if not lines or not lines[0].startswith(json.dumps({"inputs": self._inputs})[:-1]):
            header = {"inputs": self._inputs, "sites": list(sites)}
            self._path.write_text(json.dumps(header) + "\n")
            return
        whole = lines[:-1]
        yield from _units(whole[1:])
        if lines[-1]:
            self._path.write_text("\n".join(whole) + "\n")

    def append(self, index: int, unit: UnitSums) -> None:
        """Add one unit. JSON keeps every bit of a float."""
        entry = {
            "index": index,
            "batch": unit.batch,
            "num_examples": unit.num_examples,
            "num_probes": unit.num_probes,
            "sums": unit.sums.tolist(),
            "drawn": unit.drawn,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def read_units(path: Path) -> tuple[tuple[str, ...], tuple[UnitSums, ...]]:
    """Read a file of units that another process may be writing, and leave it as it is.

    Returns:
        The sites, as far as they are told, and the whole units in the order of their indices.
    """
    header, *lines = path.read_text(encoding="utf-8").split("\n")[:-1] or ["{}"]
    found = dict(_units(lines))
    sites = json.loads(header).get("sites", ())  # an earlier version told none
    return tuple(sites), tuple(found[index] for index in sorted(found))


def _units(lines: Iterable[str]) -> Iterator[tuple[int, UnitSums]]:
    for line in lines:
        entry = json.loads(line)
        yield (
            entry["index"],
            UnitSums(
                entry["batch"],
                entry["num_examples"],
                entry["num_probes"],
                np.array(entry["sums"]),
                float(entry["drawn"]),
            ),
        )
