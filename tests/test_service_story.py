"""A day in the life of the service: searches, a cancelled one, and a service that is killed."""

import json
import os
from collections import Counter

import pytest
from served import TINY, Server, driver, reach, until, without_seconds

from search.config import SearchConfig
from search.events import Event, read_events
from search.pipeline import STAGES
from search.service.client import Client
from search.service.tokens import opened_tokens

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """An undisturbed search, and one that was cancelled, resumed, and lost its service."""
    config = SearchConfig.model_validate(TINY)
    store = tmp_path_factory.mktemp("story") / "store"
    with opened_tokens(store, None) as tokens:
        secret, _ = tokens.make("ann")
    # Ray is to ask for a token, as it does where nobody has turned that off.
    environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    server = Server(store, environment=environment)
    server.start()
    found = {"store": store, "server": server}
    try:
        with Client(server.url, secret, patience_seconds=300) as client:
            calm = client.submit(config, name="calm", key="calm").id
            *found["seen"], _ = client.events(calm)
            found["calm"] = client.get(calm)

            wild = client.submit(config, name="wild", key="wild").id
            reach(store, wild, "curvature", "progress")
            client.cancel(wild)
            until(client, wild, "cancelled")
            found["cancelled"] = os.path.exists(f"/proc/{driver(store, wild)}")
            client.resume(wild)
            reach(store, wild, "calibration", "started")
            found["orphan"] = driver(store, wild)
            server.kill()
            server.start()
            found["again"] = client.submit(config, name="calm", key="calm")
            *_, found["wild"] = client.events(wild)
            yield found
    finally:
        server.stop()


def run(story, name):
    return story["store"] / "searches" / story[name].id / "run"


def test_a_search_is_watched_to_its_success(story):
    assert story["calm"].state == "succeeded"
    assert story["calm"].attempt == 1
    assert story["seen"] == read_events(run(story, "calm") / "events.jsonl")
    assert all(isinstance(event, Event) for event in story["seen"])


def test_a_cancelled_searchs_driver_is_gone(story):
    assert story["cancelled"] is False


def test_the_search_goes_on_when_the_service_was_killed(story):
    assert story["wild"].state == "succeeded"
    assert story["wild"].attempt == 3
    assert not os.path.exists(f"/proc/{story['orphan']}")


def test_a_submission_that_is_repeated_after_a_kill_is_the_same(story):
    assert story["again"].id == story["calm"].id


def test_the_result_is_that_of_the_undisturbed_run(story):
    calm, wild = (
        json.loads((run(story, n) / "summary.json").read_text()) for n in ("calm", "wild")
    )
    assert wild["model"]["weights_sha256"] == calm["model"]["weights_sha256"]
    for stage in ("curvature", "tables", "candidates", "calibration", "test"):
        assert without_seconds(wild[stage]) == without_seconds(calm[stage])


def test_nothing_is_computed_twice_but_the_unit_in_flight(story):
    events = read_events(run(story, "wild") / "events.jsonl")
    finished = Counter(event.stage for event in events if event.kind == "finished")
    assert set(finished.values()) == {1}
    assert set(finished) == {stage.name for stage in STAGES} | {"report"}
    units = (run(story, "wild") / "curvature.units.jsonl").read_text().splitlines()[1:]
    indices = [json.loads(line)["index"] for line in units]
    assert len(indices) == len(set(indices))


def test_ray_asks_for_a_token_that_others_cannot_read(story):
    token = story["store"] / "ray.token"
    assert token.stat().st_mode & 0o777 == 0o600
    for path in story["store"].rglob("*.log"):
        assert token.read_text() not in path.read_text()
