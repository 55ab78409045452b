"""The command line: ``hawq``."""

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


@app.command()
def run(
    config: ConfigPath,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run [default: runs/NAME_OF_CONFIG]")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, HOST:PORT [default: start Ray here]")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run stages again that a changed config invalidates")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config and stop")
    ] = False,
) -> None:
    """Search: traces, fronts, candidates, fine-tuning, report. Run again to go on."""
    from search.config_file import load_config  # noqa: PLC0415  torch takes seconds; --help should not

    extra = [f"ray.address={json.dumps(address)}"] if address is not None else []
    loaded = load_config(config, [*(overrides or []), *extra])
    if print_config:
        typer.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False), nl=False)
        return
    from search.pipeline import run as run_search  # noqa: PLC0415
    from search.terminal import LiveView, result_table  # noqa: PLC0415

    folder = out or Path("runs") / config.stem
    try:
        with LiveView(_out) as view:
            summary = run_search(loaded, folder, name=config.stem, force=force, listeners=[view])
    except KeyboardInterrupt:  # here, because Typer would only say "Aborted"
        _fail("interrupted: run the same command again to go on", 130)
    _out.print(result_table(summary))
    if summary.model.search_seen:
        _out.print(
            "The network was trained on the search split: its scores there rank candidates, "
            "they do not measure drops. The table's are of the test split.",
            style="yellow",
        )
    _out.print(Text(f"Report: {folder / 'report.html'}"), soft_wrap=True)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write")] = Path("search.yaml"),
) -> None:
    """Write a commented config for a search of your own."""
    from search.config_file import template  # noqa: PLC0415

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
    from search.artefacts import Summary  # noqa: PLC0415
    from search.config import SearchConfig  # noqa: PLC0415

    model = SearchConfig if of == "config" else Summary
    typer.echo(json.dumps(model.model_json_schema(), indent=2, ensure_ascii=False))


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="Ray cluster to reach, HOST:PORT")] = None,
) -> None:
    """Say what this machine has, and what each optional part still needs."""
    from search.doctor import examine  # noqa: PLC0415

    with _err.status("starting Ray"):
        checks = examine(address)
    table = Table(show_header=False, box=None)
    marks = {True: "[green]✓", False: "[red]✗", None: "[yellow]–"}
    for check in checks:
        table.add_row(marks[check.ok], Text(check.subject), Text(check.finding))
    _out.print(table)
    if any(check.ok is False for check in checks):
        raise typer.Exit(1)


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
