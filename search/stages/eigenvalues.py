"""The top eigenvalue of every block of layers, for the methods that go by them, on Ray workers.

Part of the stage curvature. A block is a unit of work; finished ones are lines of a file, so that a
stopped run goes on with the others.
"""

import json
from pathlib import Path
from typing import Any

from hawq.curvature.blocks import residual_blocks
from search.artefacts import BlockEigenvalue
from search.eigenvalues import block_record, power_iterations
from search.stages.search import Search

__all__ = ["block_eigenvalues", "eigenvalue_inputs"]

# Of an eigenvalue: a hundredth costs little more than a twentieth does, see power_iteration.py.
_RTOL = 0.01


def eigenvalue_inputs(search: Search) -> dict[str, Any]:
    """The blocks, and the precision."""
    return {"blocks": {name: list(of) for name, of in _blocks(search).items()}, "rtol": _RTOL}


def block_eigenvalues(search: Search, inputs: str) -> list[BlockEigenvalue]:
    """Find the top Hessian eigenvalue of every residual block (Dong et al., 2019).

    Args:
        search: The network, its data, and on how many examples.
        inputs: Hash of all that they depend on; blocks found with other inputs are found again.

    Returns:
        In the network's order, with their errors.

    Raises:
        NonFiniteTraceError: If a loss or a product is NaN or infinite.
    """
    blocks, path = _blocks(search), search.folder.path / "curvature.eigenvalues.jsonl"
    found = _read(path, inputs)
    missing = [name for name in blocks if name not in found]
    if missing:
        search.events.emit("curvature", "note", f"top eigenvalues of {len(missing)} blocks")
        _iterate(search, {name: blocks[name] for name in missing}, path, found)
    return [found[name] for name in blocks]


def _blocks(search: Search) -> dict[str, list[str]]:
    """Name the residual blocks with those of their layers that are searched."""
    every = residual_blocks(search.task.model())
    kept = {name: [layer for layer in of if layer in search.layers] for name, of in every.items()}
    return {name: layers for name, layers in kept.items() if layers}


def _read(path: Path, inputs: str) -> dict[str, BlockEigenvalue]:
    """Read finished blocks; a line cut short by a crash is left out."""
    header = json.dumps({"inputs": inputs})
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    if not lines or lines[0] != header:
        path.write_text(f"{header}\n", encoding="utf-8")
        return {}
    if lines[-1]:
        path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    blocks = [BlockEigenvalue.model_validate_json(line) for line in lines[1:-1]]
    return {block.block: block for block in blocks}


def _iterate(
    search: Search, blocks: dict[str, list[str]], path: Path, found: dict[str, BlockEigenvalue]
) -> None:
    config, state = search.config, search.weights
    with power_iterations(
        search.task,
        state,
        settings=config.curvature,
        workers=config.workers,
        rtol=_RTOL,
        seed=config.seed,
        progress=lambda *how: search.progress("curvature", *how),
    ) as iterations:
        for done, (name, top) in enumerate(iterations.results(blocks), 1):
            found[name] = block_record(name, blocks[name], state, top)
            with path.open("a", encoding="utf-8") as file:
                file.write(found[name].model_dump_json() + "\n")
            search.progress("curvature", done, len(blocks), "blocks", name)
        search.worker_cpu_seconds += iterations.pool.cpu_seconds
