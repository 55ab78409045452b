"""The store's contract: what is written is whole, stays, and is found again; and its tokens."""

import json
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from search.config import SearchConfig
from search.errors import InputError
from search.service.database import searches
from search.service.record import Record, StateError
from search.service.store import KeyReusedError, NoSearchError, SearchActiveError, Store
from search.service.tokens import Caller, TokenRefusedError, Tokens, opened_tokens

CONFIG = SearchConfig.model_validate(
    {"task": {"data": "digits", "pretrain": {}}, "budgets": [{"average_bits": 3}]}
)
OTHER = CONFIG.model_copy(update={"seed": 1})


class Postgres:
    """A PostgreSQL server of its own, which listens on a socket in its folder alone.

    It refuses to run as root: there Debian's user of the same name has it.
    """

    def __init__(self, programs):
        self.programs, self.user = programs, "postgres" if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short, for a socket is in it
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        self.url = f"postgresql+psycopg://hawq@/postgres?host={self.folder}"
        self.run("initdb", "--username=hawq", "--auth=trust", "--no-sync")
        self.start()

    def start(self):
        options = f"-c listen_addresses='' -c fsync=off -k {self.folder}"
        self.run("pg_ctl", "start", "--wait", "-o", options, "-l", str(self.folder / "log"))

    def stop(self):
        self.run("pg_ctl", "stop", "--wait", "--mode=immediate")

    def run(self, program, *arguments):
        data = f"--pgdata={self.folder / 'data'}"
        command = [str(self.programs / program), data, *arguments]
        quiet = subprocess.DEVNULL  # a pipe would stay open with the server
        subprocess.run(command, user=self.user, stdout=quiet, stderr=quiet, cwd="/", check=True)


@pytest.fixture(scope="module")
def postgres():
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    server = Postgres(programs[-1])
    yield server
    server.stop()
    shutil.rmtree(server.folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request):
    """URL of an index, an empty one."""
    if request.param == "sqlite":
        return None
    url = request.getfixturevalue("postgres").url
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return url


@pytest.fixture
def store(tmp_path, database):
    store = Store(tmp_path / "store", database)
    yield store
    store.close()


def submit(store, name="n", **more):
    return store.submit(CONFIG, **{"owner": "ann"} | more, name=name)[0]


def test_a_search_is_found_again_by_another_process(store, tmp_path, database):
    search = submit(store)
    again = Store(tmp_path / "store", database)
    assert again.get(search.id) == search
    assert again.folder(search.id).config() == CONFIG
    again.close()


def test_one_key_is_one_search(store):
    first, is_new = store.submit(CONFIG, owner="ann", name="n", key="k")
    assert is_new
    assert store.submit(CONFIG, owner="ann", name="n", key="k") == (first, False)
    assert store.submit(CONFIG, owner="bob", name="n", key="k")[1]  # another's key is another
    assert store.submit(CONFIG, owner="ann", name="n")[1]
    with pytest.raises(KeyReusedError):
        store.submit(OTHER, owner="ann", name="n", key="k")


def test_a_key_is_kept_when_the_index_is_lost(store, tmp_path, database):
    first, _ = store.submit(CONFIG, owner="ann", name="n", key="k")
    with store.engine.begin() as connection:
        searches.drop(connection)
    store.close()
    again = Store(tmp_path / "store", database)
    again.reindex()
    assert again.submit(CONFIG, owner="ann", name="n", key="k") == (first, False)
    again.close()


def test_a_record_that_cannot_be_read_is_left_out_and_said(store, caplog):
    first, _ = store.submit(CONFIG, owner="ann", name="first")
    second, _ = store.submit(CONFIG, owner="ann", name="second")
    (store.folder(first.id).path / "record.json").write_text("of another version")
    store.reindex()
    assert store.page().records == [second]
    assert f"search {first.id} is left out" in caplog.text


def test_keys_are_kept_as_hashes(store):
    record, _ = store.submit(CONFIG, owner="ann", name="n", key="a-very-secret-key")
    assert "a-very-secret-key" not in (store.folder(record.id).path / "record.json").read_text()


def test_many_at_once_with_one_key_get_one_search(store):
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(store.submit(CONFIG, owner="ann", name="n", key="k"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({record.id for record, _ in found}) == 1
    assert sum(is_new for _, is_new in found) == 1


def test_pages_hold_every_search_once_the_latest_first(store):
    ids = [submit(store, f"n{i}").id for i in range(7)]
    found, after = [], None
    while True:
        page = store.page(after=after, limit=3)
        found += [record.id for record in page.records]
        after = page.after
        if after is None:
            break
    assert found == ids[::-1]


def test_pages_are_filtered(store):
    submit(store, "a")
    b = submit(store, "b", owner="bob")
    store.change(b.id, Record.cancelled)
    assert [r.name for r in store.page(owner="ann").records] == ["a"]
    assert [r.name for r in store.page(state="cancelled").records] == ["b"]
    assert [r.name for r in store.page(name="b", owner="ann").records] == []


def test_what_the_index_missed_is_mended(store):
    search = submit(store)
    folder = store.folder(search.id)
    # As if the service had died between the record and the index.
    folder.write(search.model_copy(update={"state": "failed", "reason": "r"}))
    assert store.page(state="failed").records == []
    store.reindex()
    assert [record.reason for record in store.page(state="failed").records] == ["r"]
    assert store.active() == []


def test_a_folder_without_a_record_is_no_search_and_is_cleared_away(store):
    search = submit(store)
    path = store.folder(search.id).path
    (path / "record.json").unlink()
    with pytest.raises(NoSearchError):
        store.get(search.id)
    store.reindex()
    assert not path.exists()
    assert store.page().records == []


@given(st.text(max_size=40))
def test_no_text_but_an_id_leads_to_a_folder(store_of_one, text):
    store, search = store_of_one
    for tried in (text, f"../searches/{search}", f"{search}/", f"{search}\0", f"./{search}"):
        if tried != search:
            with pytest.raises(NoSearchError):
                store.folder(tried)


@pytest.fixture(scope="module")
def store_of_one(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    yield store, submit(store).id
    store.close()


def test_a_change_is_whole_however_many_change_at_once(store):
    search = submit(store)

    def more():
        for _ in range(10):
            store.change(search.id, lambda r: r.model_copy(update={"failures": r.failures + 1}))

    threads = [threading.Thread(target=more) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get(search.id).failures == 40
    assert store.page().records[0].failures == 40


def test_only_what_has_ended_is_deleted_and_then_nothing_is_left(store):
    search = submit(store)
    with pytest.raises(SearchActiveError):
        store.delete(search.id)
    store.change(search.id, Record.cancelled)
    path = store.folder(search.id).path
    store.delete(search.id)
    assert not path.exists()
    assert store.page().records == []
    with pytest.raises(NoSearchError):
        store.get(search.id)


STATES = ["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


@pytest.mark.parametrize(
    ("wish", "after"),
    [
        (Record.cancelled, ["cancelled", "cancelling", "cancelling", None, None, "cancelled"]),
        (Record.resumed, [None, None, None, None, "queued", "queued"]),
    ],
)
def test_wishes_and_states(store, wish, after):
    for state, expected in zip(STATES, after, strict=True):
        record = submit(store).model_copy(update={"state": state, "failures": 3})
        if expected is None:
            with pytest.raises(StateError, match=f"got one that is {state}"):
                wish(record)
        else:
            assert wish(record).state == expected
    assert Record.resumed(record).failures == 0


def test_documents_are_readable_without_the_program(store):
    search = submit(store)
    found = json.loads((store.folder(search.id).path / "record.json").read_text())
    assert found["owner"] == "ann"


def test_a_token_is_good_until_it_is_revoked(store):
    tokens = Tokens(store.engine)
    secret, token = tokens.make("ann")
    assert tokens.caller(secret) == Caller("ann", is_admin=False)
    assert tokens.revoke(token.id)
    assert not tokens.revoke(token.id)
    with pytest.raises(TokenRefusedError, match="revoked"):
        tokens.caller(secret)


@pytest.mark.parametrize("owner", ["", "a\0", "a\nb", "a" * 65])
def test_an_owner_that_a_database_may_not_hold_is_refused(store, owner):
    with pytest.raises(InputError, match="NAME: must be 1 to 64 characters"):
        Tokens(store.engine).make(owner)
    assert Tokens(store.engine).make("a" * 64)[1].owner == "a" * 64


def test_a_token_expires(store):
    tokens = Tokens(store.engine)
    secret, _ = tokens.make("ann", seconds=-1)
    with pytest.raises(TokenRefusedError, match="expired"):
        tokens.caller(secret)


def test_secrets_are_nowhere_kept(store, tmp_path):
    secret, _ = Tokens(store.engine).make("ann", is_admin=True)
    store.close()
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes()


@given(st.text(max_size=60))
def test_no_other_text_is_a_token(store_of_one, text):
    tokens = Tokens(store_of_one[0].engine)
    with pytest.raises(TokenRefusedError):
        tokens.caller(text)


def test_tokens_are_made_while_the_store_is_served(store, tmp_path, database):
    with opened_tokens(tmp_path / "store", database) as tokens:
        secret, _ = tokens.make("ann")
    assert Tokens(store.engine).caller(secret).name == "ann"


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////nowhere/at/all/index.db", "oracle+none://ann:secret@h/d"]
)
def test_a_database_that_cannot_be_opened_is_refused_without_its_password(tmp_path, url):
    with pytest.raises(InputError, match="--database") as refused:
        Store(tmp_path, url)
    assert "secret" not in str(refused.value)


def test_a_database_that_was_restarted_is_used_again(tmp_path, postgres):
    store = Store(tmp_path, postgres.url)
    search = submit(store)
    postgres.stop()
    postgres.start()
    assert search in store.active()
    store.close()
