"""What is done about a search, as a table; and that the loop around it does just that."""

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.config import SearchConfig
from search.service.launcher import Seen, UnreachableError
from search.service.reconcile import (
    Launch,
    Limits,
    Observation,
    Retry,
    Settle,
    Stop,
    Wait,
    decide,
)
from search.service.record import ENDED, Heartbeat, Outcome, Record
from search.service.store import Store
from search.service.supervisor import Capacity, Supervisor
from search.service.views import view

LIMITS = Limits(
    attempts=3, backoff_seconds=5, silent_seconds=60, starting_seconds=90, absent_seconds=20
)
NOW = 1000.0
SUCCEEDED = Outcome(attempt=2, ended="succeeded")
REFUSED = Outcome(attempt=2, ended="refused", reason="task.root: must be a folder")
STALE = Outcome(attempt=1, ended="succeeded")


def record(state, **more):
    plain = {"id": "a" * 12, "name": "n", "owner": "ann", "submitted": 1.0, "changed": 1.0}
    return Record(**plain | {"state": state, "attempt": 0 if state == "queued" else 2} | more)


def seen(job="running", **more):
    return Observation(now=NOW, job=job, **more)


TABLE = [
    # A search that waits.
    ("it begins", record("queued"), seen("absent"), Launch()),
    ("no room", record("queued"), seen("absent", fits=False), Wait("waits for other searches")),
    ("no Ray", record("queued"), seen("unknown"), Wait("waits for Ray to answer")),
    ("too early", record("queued", not_before=NOW + 1, reason="r"), seen("absent"), Wait("r")),
    ("the time has come", record("queued", not_before=NOW), seen("absent"), Launch()),
    # One that runs.
    ("all is well", record("running"), seen(silent_seconds=59), Wait()),
    ("Ray is slow", record("running"), seen("pending"), Wait("waits for Ray to start it")),
    ("for hours", record("running"), seen("pending", silent_seconds=9999), Wait),
    ("Ray is away", record("running"), seen("unknown", silent_seconds=59), Wait()),
    ("Ray lags", record("running"), seen("absent", silent_seconds=19), Wait()),
    ("Ray forgot", record("running"), seen("absent", silent_seconds=20), Retry),
    ("silence", record("running"), seen(silent_seconds=60), Retry),
    ("it starts", record("running"), seen(has_begun=False, silent_seconds=89), Wait()),
    ("it started never", record("running"), seen(has_begun=False, silent_seconds=90), Retry),
    ("silence of all", record("running"), seen("unknown", silent_seconds=60), Retry),
    ("it died", record("running"), seen("ended", said="SIGKILL"), Retry("SIGKILL", 1, NOW + 5)),
    ("again", record("running", failures=1), seen("ended", said="!"), Retry("!", 2, NOW + 10)),
    (
        "too often",
        record("running", failures=2),
        seen("ended", said="SIGKILL"),
        Settle("failed", "SIGKILL; 3 attempts were lost one after the other"),
    ),
    (
        "but it had come further",
        record("running", failures=2, stages=3),
        seen("ended", said="SIGKILL", stages=4),
        Retry("SIGKILL", 1, NOW + 5),
    ),
    # Its own word counts more than Ray's.
    ("done", record("running"), seen(outcome=SUCCEEDED), Settle("succeeded")),
    ("done, no job", record("running"), seen("absent", outcome=SUCCEEDED), Settle("succeeded")),
    ("done, no Ray", record("running"), seen("unknown", outcome=SUCCEEDED), Settle("succeeded")),
    ("refused", record("running"), seen(outcome=REFUSED), Settle("failed", REFUSED.reason)),
    ("an old word", record("running"), seen(outcome=STALE), Wait()),
    ("an old word, dead", record("running"), seen("ended", outcome=STALE), Retry),
    # One that shall end.
    ("it runs", record("cancelling"), seen(), Stop()),
    ("it will run", record("cancelling"), seen("pending"), Stop()),
    ("it stopped", record("cancelling"), seen("ended"), Settle("cancelled")),
    ("it is gone", record("cancelling"), seen("absent"), Settle("cancelled")),
    ("it was faster", record("cancelling"), seen("ended", outcome=SUCCEEDED), Settle("succeeded")),
    ("it was wrong", record("cancelling"), seen("ended", outcome=REFUSED), Settle("cancelled")),
    ("no answer", record("cancelling"), seen("unknown", silent_seconds=19), Stop()),
    ("none for long", record("cancelling"), seen("unknown", silent_seconds=20), Settle),
    # Ones that have ended.
    *[
        (f"it has {s}", record(s), seen("running", silent_seconds=99), Wait())
        for s in sorted(ENDED)
    ],
]


@pytest.mark.parametrize(
    ("record", "seen", "action"),
    [row[1:] for row in TABLE],
    ids=[f"{row[1].state}: {row[0]}" for row in TABLE],
)
def test_what_is_done(record, seen, action):
    found = decide(record, seen, LIMITS)
    assert isinstance(found, action) if isinstance(action, type) else found == action


observations = st.builds(
    Observation,
    now=st.just(NOW),
    job=st.sampled_from(["unknown", "absent", "pending", "running", "ended"]),
    outcome=st.sampled_from([None, SUCCEEDED, REFUSED, STALE]),
    has_begun=st.booleans(),
    silent_seconds=st.floats(0, 1e6),
    stages=st.integers(0, 9),
    fits=st.booleans(),
)
states = st.sampled_from(["queued", "running", "cancelling", "succeeded", "failed", "cancelled"])


@given(states, observations, st.integers(0, 5))
def test_nothing_ends_without_a_reason_unless_it_was_wanted(state, observation, failures):
    action = decide(record(state, failures=failures), observation, LIMITS)
    if isinstance(action, Settle) and action.state == "failed":
        assert action.reason
    if isinstance(action, Retry):
        assert action.reason
        assert action.not_before > NOW
    if state in ENDED:
        assert action == Wait()


@given(observations)
def test_a_search_whose_attempts_all_die_fails_at_last(observation):
    current = record("running", stages=observation.stages)
    dead = replace(observation, job="ended", outcome=None)
    for _ in range(LIMITS.attempts - 1):
        action = decide(current, dead, LIMITS)
        assert isinstance(action, Retry)
        current = current.model_copy(update={"failures": action.failures})
    assert isinstance(decide(current, dead, LIMITS), Settle)


@given(st.integers(1, 10_000))
def test_waits_grow_and_stay_bounded(failures):
    assert LIMITS.backoff(failures) <= LIMITS.backoff(failures + 1) <= 300


class Desk:
    """A launcher that only notes what it is told."""

    outlives_service = True

    def __init__(self):
        self.jobs, self.told, self.is_up, self.is_away = {}, [], True, False

    def launch(self, record, folder):
        if not self.is_up:
            raise UnreachableError("the desk is closed")
        self.told.append(("launch", record.attempt_id))
        self.jobs[record.attempt_id] = Seen("running")

    def stop(self, attempt):
        self.told.append(("stop", attempt))

    def seen(self):
        if self.is_away:
            raise UnreachableError("nobody answers")
        return dict(self.jobs)

    def close(self):
        pass


CONFIG = SearchConfig.model_validate(
    {"task": {"data": "digits", "pretrain": {}}, "budgets": [{"average_bits": 3}]}
)
WIDE = CONFIG.model_copy(update={"workers": CONFIG.workers.model_copy(update={"cpus": 3.0})})


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


@pytest.fixture
def desk():
    return Desk()


def supervisor(store, desk, capacity=Capacity(), limits=LIMITS):  # noqa: B008 (it is frozen)
    return Supervisor(store, desk, limits, capacity)


def test_a_search_is_launched_and_ends_by_its_own_word(store, desk):
    search, _ = store.submit(CONFIG, owner="ann", name="n")
    looking = supervisor(store, desk)
    looking.turn()
    assert desk.told == [("launch", f"{search.id}.a1")]
    store.folder(search.id).write(Outcome(attempt=1, ended="succeeded"))
    looking.turn()
    assert store.get(search.id).state == "succeeded"


def test_a_lost_attempt_is_followed_by_another_after_a_while(store, desk):
    search, _ = store.submit(CONFIG, owner="ann", name="n")
    looking = supervisor(store, desk, limits=replace(LIMITS, backoff_seconds=0.2))
    looking.turn()
    desk.jobs[f"{search.id}.a1"] = Seen("ended", "out of memory")
    looking.turn()
    lost = store.get(search.id)
    assert (lost.state, lost.failures) == ("queued", 1)
    assert "out of memory" in lost.reason
    looking.turn()
    assert store.get(search.id).attempt == 1
    time.sleep(0.25)
    looking.turn()
    assert (store.get(search.id).state, store.get(search.id).attempt) == ("running", 2)


def test_a_search_that_cannot_be_launched_fails_and_says_why(store, desk):
    search, _ = store.submit(CONFIG, owner="ann", name="n")
    desk.is_up = False
    looking = supervisor(store, desk, limits=Limits(attempts=2, backoff_seconds=0))
    for _ in range(4):
        looking.turn()
    failed = store.get(search.id)
    assert failed.state == "failed"
    assert failed.reason.startswith("the desk is closed")


def test_a_search_whose_cluster_went_away_at_its_launch_waits_for_it(store, desk):
    search, _ = store.submit(CONFIG, owner="ann", name="n")
    looking = supervisor(store, desk, limits=Limits(attempts=2, backoff_seconds=0))
    desk.is_up = False
    looking.turn()
    desk.is_away = True
    for _ in range(8):
        looking.turn()
    waiting = store.get(search.id)
    assert (waiting.state, waiting.reason) == ("queued", "waits for Ray to answer")
    desk.is_up, desk.is_away = True, False
    looking.turn()
    assert (store.get(search.id).state, store.get(search.id).attempt) == ("running", 2)


def test_a_search_whose_papers_cannot_be_read_holds_up_no_other_and_says_so(store, desk, caplog):
    first, _ = store.submit(CONFIG, owner="ann", name="first")
    second, _ = store.submit(CONFIG, owner="ann", name="second")
    papers = store.folder(first.id).path / "heartbeat.json"
    papers.write_text("of another version")
    looking = supervisor(store, desk, Capacity(searches=2))
    for _ in range(3):
        looking.turn()
    assert (store.get(first.id).state, store.get(second.id).state) == ("queued", "running")
    assert "heartbeat.json must be what this version writes" in store.get(first.id).reason
    assert caplog.text.count("it cannot be looked after") == 1
    assert view(store, store.get(first.id).model_copy(update={"attempt": 1})).latest is None
    papers.unlink()
    looking.turn()
    assert (store.get(first.id).state, store.get(first.id).reason) == ("running", "")


def test_a_failed_search_shows_the_end_of_its_log(store, desk):
    search, _ = store.submit(CONFIG, owner="ann", name="n")
    looking = supervisor(store, desk)
    looking.turn()
    folder = store.folder(search.id)
    folder.log(1).parent.mkdir()
    folder.log(1).write_text("".join(f"line {i}\n" for i in range(100)))
    folder.write(Outcome(attempt=1, ended="refused", reason="the root must be a folder"))
    looking.turn()
    failed = store.get(search.id)
    assert (failed.state, failed.reason) == ("failed", "the root must be a folder")
    assert failed.log_end.splitlines() == [f"line {i}" for i in range(80, 100)]


def test_a_heartbeat_that_stops_is_noticed_whatever_the_clocks_say(store, desk):
    search, _ = store.submit(CONFIG, owner="ann", name="n")
    looking = supervisor(store, desk, limits=replace(LIMITS, silent_seconds=0.3))
    looking.turn()
    for beat in range(1, 5):
        store.folder(search.id).write(Heartbeat(attempt=1, beat=beat, stages=0, host="h", pid=1))
        looking.turn()
        assert store.get(search.id).state == "running"
        time.sleep(0.1)
    time.sleep(0.25)
    looking.turn()
    assert store.get(search.id).state == "queued"
    assert desk.told[-1] == ("stop", f"{search.id}.a1")


def test_no_more_searches_run_than_fit_and_the_oldest_is_not_overtaken(store, desk):
    first, _ = store.submit(WIDE, owner="ann", name="first")
    second, _ = store.submit(WIDE, owner="ann", name="second")
    third, _ = store.submit(CONFIG, owner="bob", name="third")
    looking = supervisor(store, desk, Capacity(searches=3, cpus=4))
    looking.turn()
    assert [store.get(one.id).state for one in (first, second, third)] == [
        "running",
        "queued",
        "queued",
    ]
    assert store.get(second.id).reason == "waits for other searches"
    store.folder(first.id).write(Outcome(attempt=1, ended="succeeded"))
    looking.turn()
    looking.turn()
    assert [store.get(one.id).state for one in (second, third)] == ["running", "running"]


def test_what_was_cancelled_while_it_was_looked_at_is_not_launched(store, desk):
    search, _ = store.submit(CONFIG, owner="ann", name="n")
    looking = supervisor(store, desk)
    stale = store.get(search.id)
    store.change(search.id, Record.cancelled)
    looking._launch(stale)  # the moment between two lines cannot be met otherwise
    assert desk.told == []
    assert store.get(search.id).state == "cancelled"
