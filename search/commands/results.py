"""``hawq results``: a file of finished rows as the tables and sentences of a README.

Every number is computed here from the bits in the file: which test examples each trained network
got right. Errors are one standard error, ``search.replicates`` has the formulas.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from search.replicates import Measured, Replicates
from search.results.file import Results, Row, Setting, unpacked

__all__ = ["results_text"]

# What two methods' difference says of HAWQ's claims, of the first above the second.
_CLAIMS = {
    ("exact", "largest-omega"): "The smallest Ω beats the largest at the same size",
    ("exact", "weight-norm"): "Ω beats ‖ΔW‖² without the Hessian",
    ("hawq-v1", "hawq-v1-reverse"): "Quantizing the largest Ω first beats the smallest first",
    ("hawq-v1", "hawq-v1-random"): "Quantizing the largest Ω first beats a random order",
    ("hawq-v1", "hawq-v1-together"): "Quantizing block by block beats all at once",
    ("exact", "uniform"): "Ω beats uniform bits",
}

# From here on the spread of the seeds is known to a quarter.
_MANY_SEEDS = 9


@dataclass(frozen=True, slots=True)
class _Line:
    """A row with its scores, and a name that tells it from the others of its budget."""

    row: Row
    name: str
    replicates: Replicates


def results_text(found: Results) -> str:
    """Write all settings of a file in markdown, one after the other.

    Returns:
        For each its table, the paired differences, what they say of the claims, and where the
        numbers come from.
    """
    parts = []
    for hash_, setting in found.settings.items():
        rows = found.of(hash_)
        if not rows:
            continue
        lines = _lines(rows, setting)
        heading = f"{setting.tier} (setting {hash_[:8]})"
        sections = [heading, *_table(lines, setting), "", *_differences(lines)]
        parts.append("\n".join([*sections, "", *_sources(lines, setting)]))
    return "\n\n".join(parts)


def _lines(rows: list[Row], setting: Setting) -> list[_Line]:
    found = []
    for row in rows:
        same = [r for r in rows if (r.budget, r.method) == (row.budget, row.method)]
        name = row.method if len(same) == 1 else f"{row.method} {row.variant[:6]}"
        found.append(_Line(row, name, row.replicates(setting)))
    return found


def _budgets(lines: list[_Line]) -> Iterator[list[_Line]]:
    for budget in dict.fromkeys(line.row.budget for line in lines):
        yield [line for line in lines if line.row.budget == budget]


def _table(lines: list[_Line], setting: Setting) -> list[str]:
    reference = unpacked(setting.unquantized, setting.num_examples)
    full = Replicates((0,), ("",), reference[None]).measured()
    table = [
        "",
        f"| weights | activations | method | {setting.score_name} | drop | seeds |",
        "|---|---|---|---|---|---|",
        f"| 1× (32 bits) | 32 bits | fp32 | {_percent(full)} | | |",
    ]
    for group in _budgets(lines):
        for line in group:
            drop = line.replicates.drop_from(reference)
            cells = [
                *_sizes(line.row, setting),
                line.name,
                _percent(line.replicates.measured()),
                _points(drop, sign=False),
                _seeds(line),
            ]
            table.append(f"| {' | '.join(cells)} |")
    return table


def _sizes(row: Row, setting: Setting) -> tuple[str, str]:
    choices = list(row.choices.values())
    size = fmean(choice.average_bits for choice in choices)
    times = 1 / fmean(1 / choice.compression for choice in choices)
    activations = [c.activation_average_bits for c in choices if c.activation_average_bits]
    if activations:
        read = f"{fmean(activations):.2f} bits"
    else:
        read = "fp32" if setting.activation_bits is None else f"{setting.activation_bits} bits"
    return f"{times:.2f}× ({size:.2f} bits)", read


def _seeds(line: _Line) -> str:
    num, draws = len(set(line.replicates.seeds)), len(line.row.choices)
    return f"{num}, {draws} orders" if draws > 1 else str(num)


def _differences(lines: list[_Line]) -> list[str]:
    told: list[str] = []
    for group in _budgets(lines):
        pairs = list(combinations(group, 2))
        if not pairs:
            continue
        told += [f"Paired differences at {group[0].row.budget}, in points:", ""]
        told += ["| | difference | seeds | |", "|---|---|---|---|"]
        told += [_difference(first, second) for first, second in pairs]
        claims = [claim for pair in pairs if (claim := _claim(*pair)) is not None]
        told += ["", *claims] if claims else []
        told.append("")
    return told[:-1]


def _difference(first: _Line, second: _Line) -> str:
    gained = first.replicates.minus(second.replicates)
    pair = f"{first.name} − {second.name}"
    if gained is None:
        return f"| {pair} | | 0 | no seed in common |"
    return f"| {pair} | {_points(gained)} | {gained.num_seeds} | {_judged(gained)} |"


def _claim(first: _Line, second: _Line) -> str | None:
    """Say whether a claim of HAWQ's holds here, where these two are what it is about."""
    names = (first.row.method, second.row.method)
    if names[::-1] in _CLAIMS:
        first, second, names = second, first, names[::-1]
    if names not in _CLAIMS:
        return None
    gained = first.replicates.minus(second.replicates)
    if gained is None:
        return f"- {_CLAIMS[names]}: not known, {first.name} and {second.name} share no seed."
    if gained.error == 0 and gained.mean == 0:
        answer = "not told apart, the two are the same networks"
    elif abs(gained.mean) <= 2 * gained.error:
        answer = "not told apart, inside the error"
    else:
        answer = "yes" if gained.mean > 0 else "no, the other way round"
    return f"- {_CLAIMS[names]} ({first.name} − {second.name}): {answer}, {_points(gained)}."


def _judged(gained: Measured) -> str:
    inside = abs(gained.mean) <= 2 * gained.error
    part = "" if gained.seeds_error is not None else " of the images alone"
    return f"{'inside' if inside else 'outside'} the error{part}"


def _sources(lines: list[_Line], setting: Setting) -> list[str]:
    trainings = [t for line in lines for t in line.row.trainings]
    seconds = {
        (line.row.budget, t.digest, t.seed): t.seconds for line in lines for t in line.row.trainings
    }
    fewest = min(len(line.replicates.seeds) for line in lines)
    held = (
        "the test images and the seeds together"
        if fewest > 1
        else "the test images, and for rows with several seeds over these, too; one seed does not "
        "tell what another would change"
    )
    facts = {
        "Commands": [f"`{t.command}`" for t in trainings],
        "Commit": [t.commit or "not a checkout" for t in trainings],
        "Machine": [t.machine for t in trainings],
        "torch": [t.torch for t in trainings],
        "Finished": [t.date[:10] for t in trainings],
    }
    return [
        f"Errors are one standard error, over {held}; {setting.num_examples:,} test examples. "
        f"Inside the error is what is not above two of them. Fine-tuning took "
        f"{sum(seconds.values()) / 3600:.1f} hours in all.{_roughly(fewest)}",
        *(f"{what}: {'; '.join(dict.fromkeys(values))}" for what, values in facts.items()),
    ]


def _roughly(fewest: int) -> str:
    """Say how little few seeds tell of their spread: s of S normal values errs by s/√(2(S−1))."""
    if not 1 < fewest < _MANY_SEEDS:
        return ""
    share = 100 / (2 * (fewest - 1)) ** 0.5
    return (
        f" The seeds' part of an error, from {fewest} trainings, is itself uncertain by "
        f"{share:.0f} %."
    )


def _percent(found: Measured) -> str:
    return f"{100 * found.mean:.2f} ± {100 * found.error:.2f} %"


def _points(found: Measured, *, sign: bool = True) -> str:
    value = f"{100 * found.mean:{'+' if sign else ''}.2f}".replace("-", "−")
    return f"{value} ± {100 * found.error:.2f}"
