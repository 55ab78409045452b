"""From a finished run to rows of a file of results."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import load_file

from hawq.allocation import by_owner
from search.artefacts import Candidate, Draw, Summary
from search.checkout import commits
from search.folder import content_hash
from search.machine import machine_line
from search.results.file import Choice, Results, Row, Setting, Training, add, packed
from search.results.setting import shared
from search.searchers import SEARCHERS
from search.stages.test import SCORES_FILE

__all__ = ["record", "typed"]


def record(path: Path, run: Path, summary: Summary, command: str) -> Results:
    """Add the rows of a finished run to a file of results.

    Args:
        path: The file.
        run: The run's folder.
        summary: What came out of it.
        command: That made it.

    Raises:
        InputError: If the file is none of results.
    """
    common = shared(summary.config) | {"weights_sha256": summary.model.weights_sha256}
    if summary.study is not None:
        common["recipe"] = summary.study.parameters
    setting = content_hash(common)
    arrays = load_file(run / SCORES_FILE)
    scores = {
        (digest, seed): packed(arrays[key][r])
        for key, score in summary.test.scores.items()
        for r, (digest, seed) in enumerate(zip(score.digests, score.seeds, strict=True))
    }
    rows = [
        _row(summary, candidate, setting, scores, run, command)
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
            unquantized=packed(arrays["unquantized"]),
            activation_bits=None if summary.curvature.activations else section["bits"],
            config=common,
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


def _row(
    summary: Summary,
    candidate: Candidate,
    setting: str,
    scores: dict[tuple[str, int], str],
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
        "machine": machine_line(summary.machine),
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
                scores=scores[digest, seed],
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
