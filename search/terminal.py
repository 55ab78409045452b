"""What a person sees while a search runs: bars in a terminal, plain lines elsewhere."""

import time
from collections import defaultdict
from statistics import fmean
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from hawq.cost import FLOAT_BITS, mib
from search.artefacts import Candidate, Score, Summary
from search.events import Event
from search.pace import Pace, Pacemaker
from search.report.study_findings import recipe_chosen
from search.traced import EigenvalueDocument, TraceDocument

__all__ = ["LiveView", "eigenvalue_table", "result_table", "trace_table"]

_PLAIN_SECONDS = 5.0


class LiveView:
    """A listener that shows events; use it as a context manager.

    Args:
        console: Where to show them.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._paces: defaultdict[str, Pacemaker] = defaultdict(Pacemaker)
        self._last_line: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.fields[mark]} {task.description:<11}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]:>16}"),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[message]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "LiveView":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        pace = ""
        if event.kind == "progress":
            pace = _written(self._paces[event.stage](event), event.unit or "")
        if event.kind in {"note", "warning"}:
            style = "yellow" if event.kind == "warning" else "dim"
            self._console.print(Text(f"  {event.stage}: {event.message}", style))
        elif self._console.is_terminal:
            self._bar(event, pace)
        else:
            self._line(event, pace)

    def _bar(self, event: Event, pace: str) -> None:
        if event.stage not in self._bars:
            self._bars[event.stage] = self._progress.add_task(
                event.stage, total=None, mark=" ", count="", message="", pace=""
            )
        bar = self._bars[event.stage]
        if event.kind == "progress":
            assert event.done is not None
            assert event.total is not None
            count = f"{event.done:.4g}/{event.total:g} {event.unit}"
            self._progress.update(
                bar,
                completed=event.done,
                total=event.total,
                count=count,
                message=event.message,
                pace=pace,
            )
        elif event.kind in {"finished", "skipped", "failed"}:
            mark = "[red]✗" if event.kind == "failed" else "[green]✓"
            self._progress.update(
                bar, total=1, completed=1, mark=mark, message=event.message, count="", pace=""
            )
            self._progress.stop_task(bar)

    def _line(self, event: Event, pace: str) -> None:
        if event.kind == "progress":
            if event.time - self._last_line.get(event.stage, 0.0) < _PLAIN_SECONDS:
                return
            self._last_line[event.stage] = event.time
            text = f"{event.done:.4g}/{event.total:g} {event.unit} {pace}"
            parts = [event.stage, text, event.message]
        else:
            parts = [event.stage, event.kind, event.message]
        clock = time.strftime("%H:%M:%S", time.localtime(event.time))
        self._console.print(Text(f"{clock} {'  '.join(p for p in parts if p)}"), soft_wrap=True)


class _Rate(ProgressColumn):
    """Rate and time left."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["pace"]), "cyan")


def result_table(summary: Summary) -> Table:
    """Lay out what a search found: a row for the unquantized network and one a candidate.

    ``MiB`` is of the weights alone, as budgets count them, ``stored`` with their scales and widths.
    ``untrained`` is the score on the search split before fine-tuning, ``drop`` in points, on the
    test split. Where activations were searched, their average bits and the bit operations are
    shown in place of the compression.
    """
    model, test = summary.model, summary.test
    candidates = summary.candidates.candidates
    is_joint = any(row.activation_average_bits is not None for row in candidates)
    table = Table(
        title=f"{summary.name}: {model.score_name} on {test.num_examples} test examples, "
        f"{_seeds(summary)}",
        caption=recipe_chosen(summary) or None,
        box=box.SIMPLE_HEAD,
        collapse_padding=is_joint,
        pad_edge=not is_joint,
    )
    table.add_column("\nbudget", no_wrap=not is_joint)
    table.add_column("\nmethod", no_wrap=True)
    sizes = ("act.\nbits", "\nGBOPs") if is_joint else ("\nsmaller",)
    scores = ("untrained\n%", f"{model.score_name}\n%", "\ndrop")
    for heading in ("\nMiB", "stored\nMiB", "\nbits", *sizes, "\nΩ", *scores):
        table.add_column(heading, justify="right", no_wrap=True)
    size = f"{mib(FLOAT_BITS * model.num_quantizable):.4g}"
    full = [size, size, "32", *(("32", "") if is_joint else ("1×",)), "", ""]
    table.add_row("", "fp32", *full, _percent(test.unquantized), "", end_section=True)
    for budget in summary.candidates.budgets:
        rows = [row for row in candidates if row.budget == budget.label]
        labels = _spread(budget.label, len(rows)) if is_joint else [budget.label] * len(rows)
        for i, (label, row) in enumerate(zip(labels, rows, strict=True), 1):
            cells = [*_sizes(row, is_joint), *_scores(summary, row)]
            table.add_row(label, row.method, *cells, end_section=i == len(rows))
    return table


def _seeds(summary: Summary) -> str:
    """Say how many seeds scores are of, and which rows are of fewer."""
    most = len(summary.trials.seeds)
    told = f"{most} seed{'' if most == 1 else 's'}"
    fewer = dict.fromkeys(
        f"{row.method} {found}"
        for row in summary.candidates.candidates
        if (score := summary.test.scores.get(row.key)) is not None
        and (found := len(set(score.seeds))) < most
    )
    return f"{told} ({', '.join(fewer)})" if fewer else told


def _spread(label: str, num: int) -> list[str]:
    """Write the parts of a long label one below the other, in the cells of that many rows."""
    first, *rest = label.split(", ")
    if not rest or num < 2:
        return [label, *[""] * (num - 1)][:num]
    return [f"{first},", *_spread(", ".join(rest), num - 1)]


def _sizes(row: Candidate, is_joint: bool) -> list[str]:
    stored, bops = row.costs.get("stored_bits"), row.costs.get("bops")
    activations = [
        "" if row.activation_average_bits is None else f"{row.activation_average_bits:.3g}",
        "" if bops is None else f"{bops / 1e9:.3g}",
    ]
    return [
        f"{mib(row.weight_bits):.4g}",
        "" if stored is None else f"{mib(stored):.4g}",
        f"{row.average_bits:.3g}",
        *(activations if is_joint else [f"{row.compression:.4g}×"]),
        f"{row.sensitivity:.3g}",
    ]


def _scores(summary: Summary, row: Candidate) -> list[str]:
    score, trials = summary.test.scores.get(row.key), summary.trials.of(row)
    before = [trial.epochs[0].search_score for trial in trials if trial.epochs]
    untrained = f"{100 * fmean(before):.1f}" if before else ""
    if score is None:
        return [untrained, trials[0].status, ""]
    drop = f"{100 * score.drop:+.2f} ± {100 * score.drop_standard_error:.2f}".replace("+", "")
    return [untrained, _percent(score), drop]


def trace_table(found: TraceDocument) -> Table:
    """Lay out the traces of a network, a row a site; channels are in the document alone."""
    table = Table(
        title=f"{found.name}: Hessian traces of {found.subject}, {found.estimator}",
        caption=f"{found.num_probes} probes on {found.num_examples} examples of "
        f"{found.pool_size}, {found.workers} workers, {found.seconds:.1f} s",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("layer" if found.subject == "weights" else "tensor", no_wrap=True)
    for heading in ("n", "trace", "trace / n", "± probes", "± data", "share", "± share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in found.groups[: found.num_sites]:
        size = abs(group.trace)
        table.add_row(
            group.group,
            str(group.n),
            f"{group.trace:.4g}",
            f"{group.trace / group.n:.3e}",
            _relative(group.probe_error, size) if found.num_probes else "none",
            _relative(group.data_error, size),
            f"{100 * group.share:.2f} %",
            f"{100 * group.share_error:.2f}",
        )
    return table


def eigenvalue_table(found: EigenvalueDocument) -> Table:
    """Lay out the top eigenvalues of blocks, with HAWQ's order S = λ/n."""
    table = Table(
        title=f"{found.name}: top Hessian eigenvalue of each block",
        caption=f"{found.num_examples} examples of {found.pool_size}, {found.workers} workers, "
        f"{found.seconds:.1f} s",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("block", no_wrap=True)
    for heading in ("layers", "n", "λ", "± residual", "± data", "λ / n", "products"):
        table.add_column(heading, justify="right", no_wrap=True)
    for block in found.blocks:
        table.add_row(
            block.block,
            str(len(block.layers)),
            str(block.n),
            f"{block.eigenvalue:.4g}",
            _relative(block.residual, abs(block.eigenvalue)),
            _relative(block.data_error, abs(block.eigenvalue)),
            f"{block.eigenvalue / block.n:.3e}",
            f"{block.iterations}{'' if block.converged else ', not converged'}",
        )
    return table


def _relative(error: float, size: float) -> str:
    return f"{100 * error / size:.1f} %" if size else f"{error:.1g}"


def _percent(score: Score) -> str:
    return f"{100 * score.score:.2f} ± {100 * score.standard_error:.2f}"


def _written(pace: Pace | None, units: str) -> str:
    if pace is None:
        return ""
    unit = units.removesuffix("s")
    rate = f"{pace.rate:.3g} {unit}s/s" if pace.rate > 1 else f"{1 / pace.rate:.3g} s/{unit}"
    return f"{rate}, {_duration(pace.left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{rest:02}"
