"""``hawq export``: a run's network as packed integers, an ONNX graph or a torch program."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, treespec_dumps

from hawq.export import Packed, encode, load, pack
from hawq.export.program import torch_program
from hawq.finetune import calibrate, reestimate
from hawq.finetune.batch_norm import has_statistics, statistics_batches
from hawq.task import Task
from search.artefacts import (
    Candidate,
    CandidatesArtefact,
    SeededTrial,
    StudyArtefact,
    TablesArtefact,
    TestArtefact,
    TrialsArtefact,
)
from search.commands.imported import imported
from search.config import SearchConfig, suggestion
from search.config_file import load_config
from search.errors import InputError
from search.exported import ABOUT, Format, OnnxRun, graph_of
from search.folder import RunFolder, write_atomically
from search.imports import is_torch_file
from search.spaces import fixed_bits, reads_of
from search.study import with_parameters
from search.tasks.build import build_task
from search.tasks.checkpoint import read_state
from search.trials import TrialSpec, calibration_inputs, quantized_model

__all__ = ["Chosen", "chosen", "export", "given"]

_STATISTICS = (4, 64)  # batches, and examples of each, as scores without training have them


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is exported of a run.

    Attributes:
        run: Its folder.
        candidate: What a method chose.
        digest: Of the allocation: the candidate's own, or a draw's.
        trial: Its fine-tuning; None for the network that is only quantized.
    """

    run: Path
    candidate: Candidate
    digest: str
    trial: SeededTrial | None

    @property
    def bits(self) -> dict[str, int]:
        """Of the groups of its space."""
        choices = [self.candidate.bits, *(draw.bits for draw in self.candidate.draws)]
        return dict(zip(self.candidate.digests, choices, strict=True))[self.digest]


def chosen(
    run: Path,
    method: str,
    budget: str | None = None,
    seed: int | None = None,
    *,
    is_trained: bool = True,
) -> Chosen:
    """Find what a method chose in a run, and its fine-tuning.

    Args:
        run: The run's folder.
        method: Its name.
        budget: Label of the budget; None where there is one alone.
        seed: Of the fine-tuning; None for the first.
        is_trained: Whether the fine-tuned network is wanted.

    Raises:
        InputError: If there is no such candidate, or it has not been fine-tuned.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: must be the folder of a run, got no config.yaml in it")
    folder = RunFolder(run)
    if not folder.artefact("candidates").exists():
        raise InputError(f"{run}: has no candidates yet: let hawq run come past its stage")
    found = folder.load("candidates", CandidatesArtefact)[0].candidates
    methods = dict.fromkeys(c.method for c in found)
    if method not in methods:
        raise InputError(f"--method: {method!r} is none of the run's{suggestion(method, methods)}")
    mine = {c.budget: c for c in found if c.method == method}
    if budget is None and len(mine) > 1:
        raise InputError(f"--budget: must be one of {', '.join(map(repr, mine))}, got none")
    label = _label(budget, list(mine))
    candidate = mine[label]
    if not is_trained:
        return Chosen(run, candidate, candidate.digests[0], None)
    trial = _trial(run, folder, candidate, seed)
    return Chosen(run, candidate, trial.digest, trial)


def given(run: Path, allocation: Path) -> Chosen:
    """Take the bits of a file, for the network that is only quantized.

    Args:
        run: Folder of a run that came past its tables.
        allocation: What ``hawq import`` reads, or ``hawq allocate --out`` wrote.

    Raises:
        InputError: If the file and the run do not go together.
    """
    if is_torch_file(allocation):
        raise InputError(
            f"--allocation: must be a file of bits, got average traces, {allocation}: let hawq "
            "import find bits by them, with --budget and --out"
        )
    candidate = imported(allocation, run)[0]
    return Chosen(run, candidate, candidate.digest, None)


def export(
    what: Chosen, path: Path, to: Format, *, batch: int | None = None, size: int = 32
) -> tuple[str, ...]:
    """Write a run's network to a file.

    Args:
        what: Which.
        path: The file.
        to: Its format.
        batch: How many inputs an ONNX graph or torch program takes at once; None for any number.
        size: Examples of the search split that outputs are compared on.

    Returns:
        What there is to say of it, line by line.

    Raises:
        InputError: If the network cannot be exported.
    """
    config = load_config(what.run / "config.yaml")
    task = build_task(config.task, config.seed)
    try:
        packed = pack(_network(what, config, task), _about(what, task))
        if to == "packed":
            content = encode(packed)
            lines = list(_size_lines(what, packed, len(content)))
        else:
            count = min(size, task.size("search"))
            inputs = task.inputs(task.batch("search", torch.arange(count)))
            make = _onnx if to == "onnx" else _program
            content, lines = make(packed, task, inputs, batch)
    except ValueError as error:
        raise InputError(f"{what.run}: {error}") from error
    write_atomically(path, content)
    told = f"{what.candidate.method} at {what.candidate.budget}, {_state_told(what)}"
    return (f"{told}: {len(content):,} bytes", *lines)


def _label(budget: str | None, labels: Sequence[str]) -> str:
    if budget is None:
        return labels[0]
    for label in labels:
        # As it is typed on a keyboard.
        if budget in {label, label.replace("×", "x"), label.replace("×", "")}:
            return label
    raise InputError(f"--budget: must be one of {', '.join(map(repr, labels))}, got {budget!r}")


def _trial(run: Path, folder: RunFolder, candidate: Candidate, seed: int | None) -> SeededTrial:
    remedy = "run hawq run again to go on, or export what is only quantized with --untrained"
    if not folder.artefact("trials").exists():
        raise InputError(f"{run}: must have finished its trials, got none: {remedy}")
    trials = folder.load("trials", TrialsArtefact)[0].of(candidate)
    finished = {trial.seed: trial for trial in trials if trial.status == "finished"}
    if not finished:
        reasons = "; ".join(f"{t.status}: {t.reason}" for t in trials) or "none"
        raise InputError(
            f"{run}: {candidate.method} at {candidate.budget} must have a finished trial, "
            f"got {reasons}: {remedy}"
        )
    if seed is not None and seed not in finished:
        raise InputError(f"--seed: must be one of {', '.join(map(str, finished))}, got {seed}")
    return finished[next(iter(finished)) if seed is None else seed]


def _network(what: Chosen, config: SearchConfig, task: Task) -> nn.Module:
    """Build the quantized network, trained or calibrated."""
    base = read_state(what.run / "model.safetensors")
    folder = RunFolder(what.run)
    recipe, schemes = config.finetune, config.schemes
    if config.study is not None and folder.artefact("study").exists():
        study = folder.load("study", StudyArtefact)[0]
        recipe, schemes = with_parameters(recipe, schemes, study.parameters)
    bits = what.bits | fixed_bits(config, reads_of(config, task, task.model()))
    spec = TrialSpec(what.digest, bits, recipe.recipe(), config.seed, what.run, schemes=schemes)
    model = quantized_model(task, base, spec)
    if what.trial is not None:
        model.load_state_dict(
            read_state(what.run / "trials" / what.trial.folder / "model.safetensors")
        )
        return model
    calibrate(model, calibration_inputs(task, "cpu"))
    if has_statistics(model):
        reestimate(model, statistics_batches(task, *_STATISTICS, config.seed, "cpu"))
    return model


def _about(what: Chosen, task: Task) -> dict[str, Any]:
    candidate, trial = what.candidate, what.trial
    about: dict[str, Any] = {
        "method": candidate.method,
        "budget": candidate.budget,
        "allocation": what.digest,
        "seed": None if trial is None else trial.seed,
        "task": task.fingerprint,
    }
    folder = RunFolder(what.run)
    if trial is not None and folder.artefact("test").exists():
        score = folder.load("test", TestArtefact)[0].scores.get(candidate.key)
        found = {} if score is None else dict(zip(score.seeds, score.seed_scores, strict=True))
        if trial.seed in found:
            about["test"] = found[trial.seed]
    return about


def _state_told(what: Chosen) -> str:
    if what.trial is None:
        return "only quantized, not trained, batch-norm statistics estimated again"
    return f"fine-tuned with seed {what.trial.seed}"


def _size_lines(what: Chosen, packed: Packed, size: int) -> Iterator[str]:
    """Reconcile the file with what the table counts."""
    tables = RunFolder(what.run).load("tables", TablesArtefact)[0]
    costs = [what.candidate.costs, *(draw.costs for draw in what.candidate.draws)]
    counted = dict(zip(what.candidate.digests, costs, strict=True))[what.digest]["stored_bits"] / 8
    num_scales = sum(
        int((w.widths > 0).sum()) if len(w.scale) == len(w.widths) else len(w.scale)
        for w in packed.weights
    )
    kept = 4 * sum(tables.float_weights.values())
    rest = sum(value.nbytes for value in packed.rest.values()) - kept
    scale_bits = tables.scale_bits - (8 if tables.scale_bits > 16 else 0)
    wider = num_scales * (32 - scale_bits) / 8
    expected = counted + wider + rest
    yield (
        f"the table counts {counted:,.0f} bytes for weights, scales and widths of channels; the "
        f"file keeps its {num_scales:,} scales as they were trained, in 32 bits and not in "
        f"{scale_bits}: + {wider:,.0f}"
    )
    yield (
        f"biases, batch-norm and whatever else the table does not count, in 32 bits: + {rest:,} "
        f"bytes; names, ranges of activations and rounding to bytes: {size - expected:+,.0f}, "
        f"{100 * (size / expected - 1):+.2g} %"
    )


def _onnx(packed: Packed, task: Task, inputs: Tensor, batch: int | None) -> tuple[bytes, list[str]]:
    example = inputs[: batch or 2]
    if batch is not None and len(example) < batch:
        example = inputs[torch.arange(batch) % len(inputs)]
    made = graph_of(packed, task.model(), example, is_dynamic=batch is None)
    network = load(packed, task.model())
    with torch.no_grad():
        leaves, spec = tree_flatten(network(example[:1]))
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError("the network must return tensors alone to be an ONNX graph")
    outputs = treespec_dumps(spec)
    pieces = [example] if batch is not None else [inputs[:1], inputs]
    run = OnnxRun(made.model.SerializeToString(), outputs)
    error, largest = _largest_error(run, network, pieces)
    about = {**packed.about, "batch": batch, "outputs": outputs, "max_error": error}
    about["notes"] = list(made.notes)
    entry = made.model.metadata_props.add()
    entry.key, entry.value = ABOUT, json.dumps(about)
    return made.model.SerializeToString(), [*made.notes, _error_told(error, largest, pieces)]


def _program(
    packed: Packed, task: Task, inputs: Tensor, batch: int | None
) -> tuple[bytes, list[str]]:
    example = inputs[torch.arange(batch or 2) % len(inputs)]
    program = torch_program(packed, task.model(), example, is_dynamic=batch is None)
    buffer = io.BytesIO()
    about = {**packed.about, "batch": batch}
    torch.export.save(program, buffer, extra_files={f"{ABOUT}.json": json.dumps(about)})
    reloaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    pieces = [example] if batch is not None else [inputs[:1], inputs]
    error, largest = _largest_error(reloaded, load(packed, task.model()), pieces)
    return buffer.getvalue(), [_error_told(error, largest, pieces)]


@torch.no_grad()
def _largest_error(run: Any, network: nn.Module, pieces: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest difference of any output, and the largest output."""
    error = largest = 0.0
    for piece in pieces:
        pairs = zip(tree_leaves(run(piece)), tree_leaves(network(piece)), strict=True)
        for found, expected in pairs:
            error = max(error, float((found - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    return error, largest


def _error_told(error: float, largest: float, pieces: Sequence[Tensor]) -> str:
    return (
        f"outputs differ from the fake-quantized network's by at most {error:.3g}, where the "
        f"largest is {largest:.3g}, on {len(pieces[-1])} images of the search split"
    )
