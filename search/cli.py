"""The command line: ``hawq``.

A command imports what it needs when it is called: torch takes seconds, and --help should not.
"""

import errno
import json
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search.errors import InputError
from search.service_commands import app as service

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find how many bits every layer of a network needs, and fine-tune the best candidates.",
)
# Where there is no terminal, lines need not be folded at 80.
_out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
_err = Console(stderr=True, highlight=False)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file; make one with: hawq init")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE, such as curvature.rtol=0.02")
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run (default: runs/NAME_OF_CONFIG)")
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster, HOST:PORT (default: start Ray here)")
]
Force = Annotated[
    bool, typer.Option("--force", help="Run stages again that a changed config invalidates")
]


@app.command()
def run(
    config: ConfigPath,
    out: OutFolder = None,
    overrides: Overrides = None,
    address: Address = None,
    force: Force = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config and stop")
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(help="File of results to add the finished rows to: NAME.results.json"),
    ] = None,
) -> None:
    """Search: traces, fronts, candidates, fine-tuning, report. Run again to go on."""
    from search.config_file import load_config

    extra = [f"ray.address={json.dumps(address)}"] if address is not None else []
    loaded = load_config(config, [*(overrides or []), *extra])
    if print_config:
        typer.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False), nl=False)
        return
    from search.checkout import noting_commits
    from search.pipeline import run as run_search
    from search.results.file import read_results
    from search.results.record import record, typed
    from search.terminal import LiveView, result_table

    folder = out or Path("runs") / config.stem
    if results is not None and results.exists():
        read_results(results)  # now, not after hours
    try:
        with LiveView(_out) as view:
            summary = run_search(
                loaded,
                folder,
                name=config.stem,
                force=force,
                listeners=[view, noting_commits(folder)],
            )
    except KeyboardInterrupt:  # here, because Typer would only say "Aborted"
        _fail("interrupted: run the same command again to go on", 130)
    if results is not None:
        record(results, folder, summary, typed(sys.argv))
    _out.print(result_table(summary))
    if summary.model.search_seen:
        _out.print(
            "The network was trained on the search split: its scores there rank candidates, "
            "they do not measure drops. The table's are of the test split.",
            style="yellow",
        )
    _out.print(Text(f"Report: {folder / 'report.html'}"), soft_wrap=True)


@app.command()
def compare(
    config: ConfigPath,
    out: OutFolder = None,
    overrides: Overrides = None,
    address: Address = None,
    force: Force = False,
    results: Annotated[
        Path | None,
        typer.Option(
            help="File to keep finished searches in, and to go on from: NAME.comparison.json"
        ),
    ] = None,
) -> None:
    """Compare ways of searching: methods x budgets x seeds, then each method's best, fine-tuned."""
    from search.commands.compare import compare as run_comparison
    from search.comparison.text import comparison_text
    from search.terminal import LiveView

    extra = [f"ray.address={json.dumps(address)}"] if address is not None else []
    folder = out or Path("runs") / config.stem
    try:
        with LiveView(_out) as view:
            found = run_comparison(
                config, folder, [*(overrides or []), *extra], force=force, kept=results, view=view
            )
    except KeyboardInterrupt:  # here, because Typer would only say "Aborted"
        _fail("interrupted: run the same command again to go on", 130)
    typer.echo(comparison_text(found))
    _out.print(Text(f"Comparison: {folder / 'comparison.html'}"), soft_wrap=True)


@app.command()
def inspect(
    what: Annotated[
        str, typer.Argument(metavar="CONFIG|NETWORK", help="YAML file, or pytorchcv:resnet50")
    ],
    overrides: Overrides = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a network's input (default: its own)")
    ] = None,
    estimator: Annotated[
        bool, typer.Option("--estimator", help="Which estimator applies, too: a minute or more")
    ] = False,
) -> None:
    """Show what there is to quantize: layers, tensors, ties, and what stays in floating point."""
    from search.commands.inspect import inspected, inspection_view

    found = inspected(what, overrides or (), resolution=resolution, estimator=estimator)
    _out.print(inspection_view(found))


@app.command()
def trace(
    config: ConfigPath,
    of: Annotated[
        Literal["weights", "activations"], typer.Option("--of", help="Of what")
    ] = "weights",
    granularity: Annotated[
        Literal["layer", "channel"], typer.Option(help="channel traces each channel, too")
    ] = "layer",
    estimator: Annotated[
        Literal["auto", "gauss_newton", "hutchinson", "finite_difference", "fisher", "eigenvalue"],
        typer.Option(help="auto: Gauss-Newton where it is the Hessian, and says why or why not"),
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers (default: one for each CPU)")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="Relative probe error to stop at (default: the config's)")
    ] = None,
    max_probes: Annotated[
        int | None, typer.Option(help="Probes an example at most (default: the config's)")
    ] = None,
    blocks: Annotated[
        list[str] | None,
        typer.Option(help="NAME=GLOB[,GLOB]: a block of eigenvalue (default: residual blocks)"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; a page goes beside it (default: in the run)")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--run", help="Folder of the run (default: runs/NAME_OF_CONFIG)"),
    ] = None,
    overrides: Overrides = None,
    address: Address = None,
) -> None:
    """Trace the Hessian of every layer, activation tensor or channel, with its errors."""
    from search.config_file import load_config

    if estimator == "eigenvalue" and (of, granularity) != ("weights", "layer"):
        raise InputError(
            "--estimator eigenvalue: must be of weights, by blocks of layers, "
            f"got {of} by {granularity}"
        )
    if blocks and estimator != "eigenvalue":
        raise InputError(f"--blocks: is for --estimator eigenvalue, got {estimator}")
    given = {
        "workers.count": workers,
        # An eigenvalue within a hundredth costs little more; see hawq/curvature/power_iteration.py.
        "curvature.rtol": 0.01 if rtol is None and estimator == "eigenvalue" else rtol,
        "curvature.max_probes": max_probes,
        "curvature.estimator": None if estimator in {"auto", "eigenvalue"} else estimator,
        "ray.address": address,
    }
    extra = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    if max_probes is not None and max_probes < 4:
        extra.append(f"curvature.probes_per_unit={max(2, max_probes)}")
    loaded = load_config(config, [*(overrides or []), *extra])
    from search.folder import write_atomically
    from search.report import (
        render_eigenvalues,
        render_traces,
        rewrite_report,
    )
    from search.terminal import LiveView, eigenvalue_table, trace_table
    from search.trace_documents import trace_blocks, trace_network

    run_folder = folder or Path("runs") / config.stem
    path = out or run_folder / f"{'eigenvalues' if estimator == 'eigenvalue' else 'traces'}.json"
    try:
        with LiveView(_out) as view:
            if estimator == "eigenvalue":
                found = trace_blocks(
                    loaded,
                    run_folder,
                    name=config.stem,
                    groups=_groups(blocks),
                    listeners=[view],
                )
                table, page = eigenvalue_table(found), render_eigenvalues(found)
                text = found.model_dump_json(indent=1)
            else:
                traced = trace_network(
                    loaded,
                    run_folder,
                    name=config.stem,
                    subject=of,
                    granularity=granularity,
                    listeners=[view],
                )
                table, page = trace_table(traced), render_traces(traced)
                text = traced.model_dump_json(indent=1)
    except KeyboardInterrupt:
        _fail("interrupted: run the same command again to go on", 130)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    write_atomically(path.with_suffix(".html"), page)
    _out.print(table)
    _out.print(Text(f"{path} and {path.with_suffix('.html').name}"), soft_wrap=True)
    if path == run_folder / "eigenvalues.json" and (report := rewrite_report(run_folder)):
        _out.print(Text(f"Report: {report}"), soft_wrap=True)


def _groups(blocks: list[str] | None) -> dict[str, list[str]] | None:
    if not blocks:
        return None
    groups = {}
    for block in blocks:
        name, separator, globs = block.partition("=")
        if not separator or not name or not globs:
            raise InputError(f"--blocks: must be NAME=GLOB[,GLOB], got {block!r}")
        groups[name] = globs.split(",")
    return groups


@app.command()
def profile(
    config: ConfigPath,
    out: Annotated[
        Path | None, typer.Option(help="JSON file (default: runs/NAME_OF_CONFIG/latency.json)")
    ] = None,
    overrides: Overrides = None,
    batch: Annotated[int, typer.Option(help="Examples that go through at once")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of a measured layer")] = 1,
    seconds: Annotated[float, typer.Option(help="To measure each shape of a layer's call")] = 0.3,
    peak: Annotated[
        list[str] | None,
        typer.Option(help="BITS=TOPS of a machine, for a roofline (default: measure here)"),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="The machine's memory bandwidth in GB/s, for a roofline")
    ] = None,
) -> None:
    """Price every layer at every width: measured here, or by a machine's peak rates."""
    from search.commands.profile import latency_view
    from search.commands.profile import profile as profile_network
    from search.terminal import LiveView

    path = out or Path("runs") / config.stem / "latency.json"
    with LiveView(_out) as view:
        table = profile_network(
            config,
            overrides or [],
            path,
            peaks=peak or [],
            bandwidth=bandwidth,
            batch_size=batch,
            threads=threads,
            seconds=seconds,
            listeners=[view],
        )
    _out.print(latency_view(table))
    _out.print(Text(str(path)), soft_wrap=True)


@app.command()
def allocate(
    run: Annotated[Path, typer.Argument(help="Folder of a run that came past its tables")],
    budget: Annotated[
        list[str],
        typer.Option(help="KEY=VALUE, such as weight_mib=0.08; several are one budget together"),
    ],
    method: Annotated[
        str | None, typer.Option(help="exact, monotone (HAWQ-V2), uniform or channel")
    ] = None,
    granularity: Annotated[
        Literal["layer", "channel"] | None, typer.Option(help="What receives bits of its own")
    ] = None,
    max_widths: Annotated[
        int | None, typer.Option(min=1, help="Different widths that a layer's channels may have")
    ] = None,
    multiple: Annotated[
        int, typer.Option(min=1, help="Channels of one width come in multiples of this")
    ] = 1,
    pin: Annotated[
        list[str] | None, typer.Option(help="GLOB=BITS, such as conv1=8 or a:conv1=8")
    ] = None,
    tie: Annotated[list[str] | None, typer.Option(help="GLOB,GLOB: these share their bits")] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Measure it, too, without training: seconds to minutes")
    ] = False,
    score_examples: Annotated[
        int | None, typer.Option(min=2, help="First examples of the search split (default: all)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the allocation")] = None,
) -> None:
    """Choose bits for another budget from a run's tables: no probes, no training."""
    from search.commands.allocate import allocate as solve
    from search.commands.allocate import allocation_view
    from search.folder import write_atomically
    from search.searchers import Rules

    found, tables = solve(
        run,
        budget,
        method=method,
        granularity=granularity,
        rules=Rules(max_widths, multiple),
        pins=pin or [],
        ties=tie or [],
    )
    _out.print(allocation_view(found, tables))
    if score:
        from search.commands.score import score_candidate, score_spec, score_view

        scored = score_candidate(score_spec(run, num_examples=score_examples), found, tables)
        _out.print(Text(score_view(run, scored)))
    if out is not None:
        write_atomically(out, found.model_dump_json(indent=1))
        _out.print(Text(str(out)), soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run")],
    out: Annotated[Path, typer.Option(help="File to write")],
    method: Annotated[str | None, typer.Option(help="Whose allocation")] = None,
    allocation: Annotated[
        Path | None,
        typer.Option(help="Or bits of a file, as hawq import reads them: only quantized"),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Label of the budget, where there are several")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the fine-tuning (default: the first that finished)")
    ] = None,
    to: Annotated[
        Literal["packed", "onnx", "torch"],
        typer.Option(
            "--format", help="packed: integers at their width; onnx: QDQ; torch: torch.export"
        ),
    ] = "packed",
    batch: Annotated[
        str, typer.Option(help="Inputs that an ONNX graph or torch program takes at once")
    ] = "dynamic",
    untrained: Annotated[
        bool, typer.Option("--untrained", help="What is only quantized, not fine-tuned")
    ] = False,
) -> None:
    """Write a run's network as packed integers, an ONNX graph or a torch program."""
    from search.commands.export import chosen, given
    from search.commands.export import export as export_network

    if batch != "dynamic" and not (batch.isdigit() and int(batch) > 0):
        raise InputError(f"--batch: must be dynamic or a number from 1 on, got {batch!r}")
    if (method is None) == (allocation is None):
        raise InputError("give either --method, of the run's, or --allocation, a file of bits")
    if allocation is None:
        assert method is not None
        what = chosen(run, method, budget, seed, is_trained=not untrained)
    elif budget is not None or seed is not None:
        raise InputError("--budget, --seed: are of the run's methods, got --allocation")
    else:
        what = given(run, allocation)
    size = None if batch == "dynamic" else int(batch)
    for line in export_network(what, out, to, batch=size):
        _out.print(Text(line))
    _out.print(Text(str(out)), soft_wrap=True)


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="Packed, ONNX or torch file of hawq export")],
    config: ConfigPath,
    split: Annotated[Literal["test", "search", "train"], typer.Option(help="To score")] = "test",
    batch: Annotated[int, typer.Option(min=1, help="Inputs at once, to time")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="To compute with")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="To time; 0: not at all")] = 3.0,
    overrides: Overrides = None,
) -> None:
    """Measure an exported file itself: its score, its size, its latency beside fp32."""
    from search.commands.evaluate import evaluate_file, measured_lines

    found = evaluate_file(
        file,
        config,
        overrides or [],
        split=split,
        batch=batch,
        threads=threads,
        seconds=seconds,
    )
    for line in measured_lines(found):
        _out.print(Text(line))


@app.command("import")
def import_bits(
    file: Annotated[
        Path,
        typer.Argument(
            help="NNCF's bitwidth_per_scope or average traces, CSV with layer and bits, or JSON"
        ),
    ],
    run: Annotated[Path, typer.Argument(help="Folder of a run that came past its tables")],
    budget: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE: what bits by average traces may cost")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the allocation")] = None,
    pins: Annotated[
        Path | None,
        typer.Option(help="YAML file for a config that pins these bits: hawq run fine-tunes them"),
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Measure it, too, without training: seconds to minutes")
    ] = False,
) -> None:
    """Price what another program chose, or traced, by a run's tables."""
    from search.commands.allocate import allocation_view
    from search.commands.imported import imported, pinned
    from search.folder import write_atomically

    found, tables, left_out = imported(file, run, budget or [])
    _out.print(allocation_view(found, tables))
    if left_out:
        _out.print(Text(f"left out: {len(left_out)} of what operators write: {left_out[0]}, …"))
    if score:
        from search.commands.score import score_candidate, score_spec, score_view

        _out.print(Text(score_view(run, score_candidate(score_spec(run), found, tables))))
    if out is not None:
        write_atomically(out, found.model_dump_json(indent=1))
        _out.print(Text(str(out)), soft_wrap=True)
    if pins is not None:
        write_atomically(pins, pinned(run, found))
        _out.print(Text(f"{pins}. Next: hawq run {pins}"), soft_wrap=True)


@app.command()
def front(
    run: Annotated[Path, typer.Argument(help="Folder of a run")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file (default: front.html in the run's folder)")
    ] = None,
) -> None:
    """Draw what every method offers at every size, from what a run has traced."""
    from search.commands.front import front_page

    _out.print(Text(f"Fronts: {front_page(run, out)}"), soft_wrap=True)


@app.command()
def results(
    file: Annotated[
        Path,
        typer.Argument(
            help="NAME.results.json, of hawq run --results, or NAME.comparison.json, of hawq "
            "compare --results"
        ),
    ],
) -> None:
    """Print what a comparison found, in markdown: tables, paired differences, and their errors."""
    from search.commands.results import results_text
    from search.comparison.file import is_comparison, read_comparison
    from search.comparison.text import comparison_text
    from search.results.file import read_results

    if is_comparison(file):
        typer.echo(comparison_text(read_comparison(file)))
    else:
        typer.echo(results_text(read_results(file)))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write")] = Path("search.yaml"),
) -> None:
    """Write a commented config for a search of your own."""
    from search.config_file import template

    if path.exists():
        raise InputError(f"{path}: must not exist yet, got a file: choose another name")
    path.write_text(template(), encoding="utf-8")
    _out.print(Text(f"Wrote {path}. Next: hawq run {path}"), soft_wrap=True)


@app.command()
def schema(
    of: Annotated[
        Literal["config", "summary"], typer.Argument(help="Of the config, or of summary.json")
    ] = "config",
) -> None:
    """Print a JSON Schema."""
    from search.artefacts import Summary
    from search.config import SearchConfig

    model = SearchConfig if of == "config" else Summary
    typer.echo(json.dumps(model.model_json_schema(), indent=2, ensure_ascii=False))


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="Ray cluster to reach, HOST:PORT")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Build what this config describes, and look at it, instead")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Say what this machine has, and what each optional part still needs; or check a config."""
    from search.commands.doctor import examine, examine_config

    with _err.status("starting Ray" if config is None else "looking"):
        checks = examine(address) if config is None else examine_config(config, overrides or [])
    table = Table(show_header=False, box=None)
    marks = {True: "[green]✓", False: "[red]✗", None: "[yellow]–"}
    for check in checks:
        table.add_row(marks[check.ok], Text(check.subject), Text(check.finding))
    _out.print(table)
    if any(check.ok is False for check in checks):
        raise typer.Exit(1)


app.add_typer(service)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    try:
        app()
    except InputError as error:
        _fail(str(error), 2)
    except OSError as error:
        # One from a worker arrives wrapped, with the original as its cause.
        cause: OSError = getattr(error, "cause", error)
        if cause.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}:
            raise
        where = f"{cause.filename}: " if cause.filename else ""
        _fail(
            f"{where}must be writable, got {cause.strerror!r}: what is finished is kept; mend it "
            "and run the same command again",
            2,
        )


def _fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines():
        _err.print(Text(f"error: {line}", "red"), soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
