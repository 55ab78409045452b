"""From a finished run to rows of a file of results."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from hawq.allocation import by_owner
from search.artefacts import Candidate, Draw, Summary
from search.checkout import commits
from search.errors import InputError
from search.folder import content_hash
from search.results_file import Choice, Results, Row, Setting, Training, add, packed
from search.searchers import SEARCHERS
from search.stages.test import SCORES_FILE

__all__ = ["record", "typed"]

# What rows of one comparison may differ in; and where files are, which weights' hash stands for.
_FREE = {"budgets", "methods", "uniform_draws", "calibration", "study", "workers", "ray"}
_PLACES = {"root", "checkpoint"}
_TRIALS = ("asha", "workers")


def record(path: Path, run: Path, summary: Summary, command: str) -> Results:
    """Add the rows of a finished run to a file of results.

    Args:
        path: The file.
        run: The run's folder.
        summary: What came out of it.
        command: That made it.

    Raises:
        InputError: If the file is none of results, or scores are not right or wrong.
    """
    shared = _shared(summary)
    setting = content_hash(shared)
    scores = load_file(run / SCORES_FILE)
    try:
        correct = {
            (digest, seed): packed(scores[key][r])
            for key, score in summary.test.scores.items()
            for r, (digest, seed) in enumerate(zip(score.digests, score.seeds, strict=True))
        }
        unquantized = packed(scores["unquantized"])
    except ValueError as error:
        raise InputError(f"--results: {error}") from error
    rows = [
        _row(summary, candidate, setting, correct, run, command)
        for candidate in summary.candidates.candidates
        if candidate.key in summary.test.scores
    ]
    section = summary.config["activations"]
    return add(
        path,
        setting,
        Setting(
            tier=summary.name,
            score_name=summary.model.score_name,
            num_examples=summary.test.num_examples,
            unquantized=unquantized,
            activation_bits=None if summary.curvature.activations else section["bits"],
            config=shared,
        ),
        rows,
    )


def typed(arguments: Sequence[str]) -> str:
    """Return a command as one would type it: the program's name, and no places of files."""
    kept = ["hawq"]
    skip = False
    for argument in arguments[1:]:
        option, equals, _ = argument.partition("=")
        is_place = option in {"--out", "--results"}
        if not skip and not is_place:
            kept.append(argument)
        skip = not skip and is_place and not equals
    return shlex.join(kept)


def _shared(summary: Summary) -> dict[str, Any]:
    """Return what a comparison's rows have in common."""
    config = summary.config
    found = {key: value for key, value in config.items() if key not in _FREE | {"trials", "task"}}
    found["task"] = {key: value for key, value in config["task"].items() if key not in _PLACES}
    found["trials"] = {key: config["trials"][key] for key in _TRIALS if key in config["trials"]}
    found["weights_sha256"] = summary.model.weights_sha256
    study = getattr(summary, "study", None)
    if study is not None:
        found["recipe"] = study.parameters
    return found


def _row(
    summary: Summary,
    candidate: Candidate,
    setting: str,
    correct: dict[tuple[str, int], str],
    run: Path,
    command: str,
) -> Row:
    score = summary.test.scores[candidate.key]
    seconds = {(t.digest, t.seed): t.seconds for t in summary.trials.trials}
    done = list(zip(score.digests, score.seeds, strict=True))
    every: list[Candidate | Draw] = [candidate, *candidate.draws]
    chosen = dict(zip(candidate.digests, every, strict=True))
    facts = {
        "command": command,
        "commit": ", then ".join(commits(run)) or None,
        "machine": f"{summary.machine['processor']}, {summary.machine['cpus']} CPUs"
        + (f", {summary.machine['gpus']}" if "gpus" in summary.machine else ""),
        "torch": summary.versions["torch"],
        "date": summary.finished,
    }
    return Row(
        setting=setting,
        budget=candidate.budget,
        method=candidate.method,
        variant="" if SEARCHERS[candidate.method].is_random else candidate.digests[0],
        choices={
            digest: _choice(candidate, chosen[digest])
            for digest in dict.fromkeys(d for d, _ in done)
        },
        trainings=[
            Training(
                seed=seed,
                digest=digest,
                correct=correct[digest, seed],
                seconds=seconds[digest, seed],
                **facts,
            )
            for digest, seed in sorted(done, key=lambda training: training[::-1])
        ],
    )


def _choice(candidate: Candidate, chosen: Candidate | Draw) -> Choice:
    """Describe an allocation: the candidate's own, or that of one of its draws."""
    ratio = chosen.costs["weight_bits"] / candidate.costs["weight_bits"]
    activations = candidate.activation_average_bits
    if activations is not None:
        activations *= chosen.costs["activation_bits"] / candidate.costs["activation_bits"]
    return Choice(
        bits={
            owner: bits if isinstance(bits, int) else list(bits)
            for owner, bits in by_owner(chosen.bits).items()
        },
        order=candidate.order,
        compression=candidate.compression / ratio,
        average_bits=candidate.average_bits * ratio,
        activation_average_bits=activations,
        sensitivity=chosen.sensitivity,
    )
