"""The service's commands: one serves and makes tokens, the others ask a service.

As in ``search/cli.py``, a command imports what it needs when it is called.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search.errors import InputError

if TYPE_CHECKING:
    from search.service.client import Client
    from search.service.views import SearchView

__all__ = ["app"]

app = typer.Typer()
token = typer.Typer(no_args_is_help=True, help="Make, list and revoke the service's tokens.")
app.add_typer(token, name="token")
_out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

StorePath = Annotated[
    Path, typer.Option("--store", envvar="HAWQ_STORE", help="Folder of all searches")
]
Database = Annotated[
    str | None,
    typer.Option(
        envvar="HAWQ_DATABASE",
        help="URL of the index, such as postgresql+psycopg://… (default: a file in the store)",
    ),
]
Url = Annotated[str, typer.Option(envvar="HAWQ_URL", help="Of the service")]
Secret = Annotated[
    str | None,
    typer.Option("--token", envvar="HAWQ_TOKEN", help="Better in the environment than here"),
]
SearchId = Annotated[str, typer.Argument(help="Id of a search; see hawq list")]
_STORE = Path("store")
_URL = "http://127.0.0.1:8300"


@app.command()
def serve(
    store: StorePath = _STORE,
    host: Annotated[str, typer.Option(help="To listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="To listen on", min=1, max=65535)] = 8300,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Dashboard of a Ray cluster, http://HOST:8265 (default: start Ray here)"),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Python on the cluster (default: the same path as here)")
    ] = None,
    database: Database = None,
    no_login: Annotated[
        bool, typer.Option("--no-login", help="Ask for no token; on a loopback --host alone")
    ] = False,
    allow_path: Annotated[
        list[Path] | None, typer.Option(help="Folder whose files a config may name")
    ] = None,
    allow_module: Annotated[
        list[str] | None, typer.Option(help="Module whose callables a config may name")
    ] = None,
    allow_library: Annotated[
        list[str] | None, typer.Option(help="Of published networks: timm, pytorchcv, mmdet, …")
    ] = None,
    allow_detectors: Annotated[
        list[Path] | None, typer.Option(help="Folder whose mmdetection configs one may name")
    ] = None,
    max_searches: Annotated[int, typer.Option(min=1, help="At once; others wait")] = 1,
    max_cpus: Annotated[
        float | None, typer.Option(help="That searches may need together, at the least")
    ] = None,
    max_gpus: Annotated[
        float | None, typer.Option(help="That searches may need together, at the least")
    ] = None,
    attempts: Annotated[
        int, typer.Option(min=1, help="That may be lost in one stage before a search has failed")
    ] = 5,
    body_kib: Annotated[int, typer.Option(min=1, help="Of a request's body, at most")] = 1024,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second of one address")] = 20,
) -> None:
    """Serve searches: submit, watch, cancel and resume them over HTTP."""
    _need_service()
    from search.service.app import Settings
    from search.service.policy import Policy
    from search.service.reconcile import Limits
    from search.service.serving import serve as serve_store
    from search.service.supervisor import Capacity

    policy = Policy(
        paths=tuple(allow_path or ()),
        modules=tuple(allow_module or ()),
        libraries=tuple(allow_library or ()),
        detectors=tuple(allow_detectors or ()),
        cpus=max_cpus,
        gpus=max_gpus,
    )
    serve_store(
        store,
        Settings(policy, not no_login, body_kib << 10, rate, max(1, int(5 * rate))),
        host=host,
        port=port,
        database=database,
        ray_address=ray_address,
        python=python,
        limits=Limits(attempts=attempts),
        capacity=Capacity(max_searches, max_cpus, max_gpus),
    )


@token.command()
def make(
    owner: Annotated[str, typer.Argument(help="Who may use it")],
    store: StorePath = _STORE,
    database: Database = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="It opens the searches of others, too")
    ] = False,
    days: Annotated[
        float | None, typer.Option(min=0.001, help="How long it is good (default: for ever)")
    ] = None,
) -> None:
    """Make a token, and print it; it is shown this once."""
    from search.service.tokens import opened_tokens

    with opened_tokens(store, database) as tokens:
        secret, _ = tokens.make(
            owner, is_admin=admin, seconds=None if days is None else 86400 * days
        )
    typer.echo(secret)


@token.command("list")
def list_tokens(store: StorePath = _STORE, database: Database = None) -> None:
    """List tokens, without their secrets."""
    from search.service.tokens import opened_tokens

    table = Table("id", "owner", "admin", "made", "expires", "", box=None)
    with opened_tokens(store, database) as tokens:
        for one in tokens.all():
            expires = "never" if one.expires is None else _clock(one.expires)
            admin = "admin" if one.is_admin else ""
            revoked = "" if one.revoked is None else "revoked"
            cells = (one.id, one.owner, admin, _clock(one.created), expires, revoked)
            table.add_row(*map(Text, cells))
    _out.print(table)


@token.command()
def revoke(
    token_id: Annotated[str, typer.Argument(help="Id of a token; see hawq token list")],
    store: StorePath = _STORE,
    database: Database = None,
) -> None:
    """Revoke a token."""
    from search.service.tokens import opened_tokens

    with opened_tokens(store, database) as tokens:
        if not tokens.revoke(token_id):
            raise InputError(f"token {token_id!r} must be one that is good: see hawq token list")


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="YAML file; make one with: hawq init")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, such as curvature.rtol=0.02")
    ] = None,
    name: Annotated[str | None, typer.Option(help="For people (default: the file's)")] = None,
    key: Annotated[
        str | None, typer.Option(help="Submitted twice with one key, it is one search")
    ] = None,
    watching: Annotated[bool, typer.Option("--watch", help="Then watch it")] = False,
    url: Url = _URL,
    secret: Secret = None,
) -> None:
    """Submit a search to a service; prints its id."""
    from search.config_file import load_config

    loaded = load_config(config, overrides or [])
    with _client(url, secret) as client:
        found = client.submit(loaded, name=name or config.stem, key=key)
        typer.echo(found.id)
        if watching:
            _watch(client, found.id)


@app.command("list")
def list_searches(
    state: Annotated[
        Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"] | None,
        typer.Option(help="In this state alone"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of this name alone")] = None,
    owner: Annotated[str | None, typer.Option(help="Whose; for admins")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this search")] = None,
    url: Url = _URL,
    secret: Secret = None,
) -> None:
    """List the searches of a service, the latest first."""
    with _client(url, secret) as client:
        page = client.page(state=state, name=name, owner=owner, limit=limit, after=after)
    table = Table("id", "name", "owner", "submitted", "state", "attempt", "", box=None)
    for one in page.searches:
        cells = (one.id, one.name, one.owner, _clock(one.submitted), one.state, str(one.attempt))
        table.add_row(*map(Text, (*cells, _progress(one))))
    _out.print(table)
    if page.after is not None:
        _out.print(Text(f"More: hawq list --after {page.after}"), soft_wrap=True)


@app.command()
def watch(search: SearchId, url: Url = _URL, secret: Secret = None) -> None:
    """Watch a search live until it has ended."""
    with _client(url, secret) as client:
        _watch(client, search)


@app.command()
def logs(
    search: SearchId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until its end")] = False,
    tail: Annotated[int, typer.Option(min=1, max=10_000, help="Lines, at most")] = 100,
    attempt: Annotated[int | None, typer.Option(min=1, help="Default: the latest")] = None,
    url: Url = _URL,
    secret: Secret = None,
) -> None:
    """Print the end of a search's log."""
    with _client(url, secret) as client:
        for text in client.logs(search, attempt=attempt, tail=tail, follow=follow):
            typer.echo(text, nl=False)


@app.command()
def cancel(search: SearchId, url: Url = _URL, secret: Secret = None) -> None:
    """Cancel a search; what is finished is kept."""
    with _client(url, secret) as client:
        typer.echo(client.cancel(search).state)


@app.command()
def resume(search: SearchId, url: Url = _URL, secret: Secret = None) -> None:
    """Let a failed or cancelled search go on from where it was."""
    with _client(url, secret) as client:
        typer.echo(client.resume(search).state)


@app.command()
def delete(search: SearchId, url: Url = _URL, secret: Secret = None) -> None:
    """Delete a search that has ended, and all that it found."""
    with _client(url, secret) as client:
        client.delete(search)


@app.command()
def result(
    search: SearchId,
    as_json: Annotated[bool, typer.Option("--json", help="The whole summary")] = False,
    url: Url = _URL,
    secret: Secret = None,
) -> None:
    """Print what a search found."""
    import json

    from search.artefacts import Summary
    from search.terminal import result_table

    with _client(url, secret) as client:
        found = client.result(search)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _out.print(result_table(Summary.model_validate(found)))


@app.command()
def artefacts(
    search: SearchId,
    out: Annotated[Path | None, typer.Option(help="Folder to download them to")] = None,
    only: Annotated[str | None, typer.Option(help="GLOB, such as report.html or 'best/*'")] = None,
    url: Url = _URL,
    secret: Secret = None,
) -> None:
    """List a run's files, or download them."""
    from fnmatch import fnmatchcase

    from search.folder import write_atomically

    with _client(url, secret) as client:
        for one in client.artefacts(search):
            if only is not None and not fnmatchcase(one.path, only):
                continue
            if out is None:
                typer.echo(f"{one.size:>12}  {one.path}")
                continue
            place = out / one.path
            if not place.resolve().is_relative_to(out.resolve()):
                raise InputError(f"{one.path!r} must be within {out}: the service is not to trust")
            write_atomically(place, client.download(search, one.path))
            typer.echo(str(place))


def _client(url: str, secret: str | None) -> "Client":
    _need_service()
    from search.service.client import Client

    return Client(url, secret)


def _need_service() -> None:
    """Refuse where the service's packages are not installed.

    Raises:
        InputError: If so.
    """
    from importlib.util import find_spec

    packages = ("fastapi", "httpx", "sqlalchemy", "sse_starlette", "uvicorn")
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(
            f"the service needs {', '.join(missing)}, got none: pip install 'hawq-search[service]'"
        )


def _watch(client: "Client", search: str) -> None:
    from search.events import Event
    from search.terminal import LiveView

    with LiveView(_out) as view:
        for found in client.events(search):
            if isinstance(found, Event):
                view(found)
    ended = client.get(search)
    if ended.log_end:
        _out.print(Text(ended.log_end, "dim"))
    _out.print(Text(": ".join(part for part in (ended.state, ended.reason) if part)))
    if ended.state != "succeeded":
        raise typer.Exit(1)


def _progress(search: "SearchView") -> str:
    latest = search.latest
    if search.state != "running" or latest is None:
        return search.reason
    done = "" if latest.done is None else f" {latest.done:.4g}/{latest.total:g} {latest.unit}"
    return f"{latest.stage}{done}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
