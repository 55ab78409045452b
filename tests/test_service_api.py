"""The REST interface: what it grants, and above all what it refuses, and in which words."""

import json
import threading
import time

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search.errors import InputError
from search.events import Event, EventLog
from search.service.app import Settings, create_app
from search.service.client import Client
from search.service.guard import Rate
from search.service.policy import Policy, PolicyError
from search.service.record import Heartbeat, Outcome
from search.service.store import Store
from search.service.tokens import Tokens

BODY = {
    "task": {"data": "digits", "network": "resnet8", "pretrain": {"epochs": 1}},
    "budgets": [{"average_bits": 3}],
}
DETECTOR = {"pretrain": {"epochs": 1}}
PATHS = [
    ("GET", "/v1/me"),
    ("GET", "/v1/searches"),
    ("POST", "/v1/searches"),
    ("GET", "/v1/searches/{}"),
    ("DELETE", "/v1/searches/{}"),
    ("GET", "/v1/searches/{}/config"),
    ("POST", "/v1/searches/{}/cancel"),
    ("POST", "/v1/searches/{}/resume"),
    ("GET", "/v1/searches/{}/logs"),
    ("GET", "/v1/searches/{}/events"),
    ("GET", "/v1/searches/{}/result"),
    ("GET", "/v1/searches/{}/artefacts"),
    ("GET", "/v1/searches/{}/artefacts/config.yaml"),
]


class Service:
    """A service that answers and runs nothing, with a token each for Ann, Bob and an admin."""

    def __init__(self, path, **how):
        self.store = Store(path)
        tokens = Tokens(self.store.engine)
        self.secrets = {
            "ann": tokens.make("ann")[0],
            "bob": tokens.make("bob")[0],
            "root": tokens.make("root", is_admin=True)[0],
            "late": tokens.make("ann", seconds=-1)[0],
        }
        secret, gone = tokens.make("ann")
        tokens.revoke(gone.id)
        self.secrets["revoked"] = secret
        plain = {"policy": Policy((path / "data",), ("blobs",), cpus=4), "per_second": 1e6}
        self.app = create_app(self.store, Settings(**plain | {"burst": 10**6} | how))
        config = uvicorn.Config(self.app, port=0, log_config=None, lifespan="on")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._http = httpx.Client(timeout=30)
        return self

    def __exit__(self, *_):
        self._http.close()
        self._server.should_exit = True
        self._thread.join()

    def ask(self, method, path, who="ann", **more):
        headers = more.pop("headers", {})
        if who is not None:
            headers = {"Authorization": f"Bearer {self.secrets.get(who, who)}"} | headers
        return self._http.request(method, self.url + path, headers=headers, **more)

    def submit(self, who="ann", **more):
        return self.ask("POST", "/v1/searches", who, json=BODY, **more).json()["id"]

    def end(self, search, state="succeeded"):
        self.store.change(search, lambda r: r.model_copy(update={"state": state}))


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Service(tmp_path_factory.mktemp("service")) as service:
        yield service


def refused(answer, status, *fields):
    """Check that an answer is a problem document that names just these fields."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == status
    assert found["title"]
    assert found["detail"]
    assert [one["field"] for one in found["errors"]] == list(fields)
    return found


def test_a_search_is_submitted_found_and_cancelled(service):
    answer = service.ask("POST", "/v1/searches?name=mine", json=BODY)
    assert answer.status_code == 201
    found = answer.json()
    assert (found["name"], found["owner"], found["state"]) == ("mine", "ann", "queued")
    assert service.ask("GET", answer.headers["Location"]).json() == found
    config = service.ask("GET", f"/v1/searches/{found['id']}/config").json()
    assert config["budgets"][0]["average_bits"] == 3
    cancelled = service.ask("POST", f"/v1/searches/{found['id']}/cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (202, "cancelled")
    assert service.ask("POST", f"/v1/searches/{found['id']}/resume").json()["state"] == "queued"


def test_the_same_key_is_the_same_search(service):
    key = {"Idempotency-Key": "k-1"}
    first = service.ask("POST", "/v1/searches", json=BODY, headers=key)
    second = service.ask("POST", "/v1/searches", json=BODY, headers=key)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    other = service.ask("POST", "/v1/searches", json=BODY | {"seed": 1}, headers=key)
    refused(other, 422, "Idempotency-Key")


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("who", [None, "nonsense", "late", "revoked"])
def test_nobody_enters_without_a_good_token(service, method, path, who):
    answer = service.ask(method, path.format("a" * 12), who)
    refused(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_token_that_another_process_revokes_is_soon_no_good(service):
    secret, token = Tokens(service.store.engine).make("ann")
    assert service.ask("GET", "/v1/me", secret).status_code == 200
    Tokens(service.store.engine).revoke(token.id)
    time.sleep(1.1)
    refused(service.ask("GET", "/v1/me", secret), 401)


def test_what_a_driver_told_last_is_shown_at_once(service):
    search = service.submit()
    folder = service.store.folder(search)
    service.store.change(search, lambda r: r.model_copy(update={"state": "running", "attempt": 1}))
    seen = []
    for beat, (attempt, stage) in enumerate([(1, "model"), (1, "curvature"), (2, "tables")]):
        event = Event(time.time(), stage, "started")
        folder.write(
            Heartbeat(attempt=attempt, beat=beat, stages=0, host="here", pid=1, latest=event)
        )
        [listed] = [
            one
            for one in service.ask("GET", "/v1/searches").json()["searches"]
            if one["id"] == search
        ]
        assert listed == service.ask("GET", f"/v1/searches/{search}").json()
        seen.append(listed["latest"] and listed["latest"]["stage"])
    assert seen == ["model", "curvature", None]  # of an attempt that is not the latest, nothing
    service.end(search)


def test_a_token_in_another_scheme_is_no_token(service):
    headers = {"Authorization": f"Basic {service.secrets['ann']}"}
    refused(service.ask("GET", "/v1/me", None, headers=headers), 401)


@pytest.mark.parametrize(("method", "path"), [row for row in PATHS if "{}" in row[1]])
def test_a_search_of_somebody_else_is_as_if_it_were_not_there(service, method, path):
    search = service.submit("ann")
    absent = service.ask(method, path.format("0" * 12), "bob")
    hidden = service.ask(method, path.format(search), "bob")
    refused(hidden, 404)
    assert hidden.text == absent.text
    assert service.store.get(search).state == "queued"


def test_lists_hold_ones_own_and_an_admins_all(service):
    ids = {who: service.submit(who) for who in ("ann", "bob")}
    for who, owners in (("ann", {"ann"}), ("bob", {"bob"}), ("root", {"ann", "bob"})):
        page = service.ask("GET", "/v1/searches?limit=200", who).json()
        assert {one["owner"] for one in page["searches"]} == owners
    asked = service.ask("GET", "/v1/searches?owner=ann&limit=200", "bob").json()
    assert {one["owner"] for one in asked["searches"]} == {"bob"}
    assert service.ask("GET", f"/v1/searches/{ids['ann']}", "root").status_code == 200
    refused(service.ask("GET", f"/v1/searches?after={ids['ann']}", "bob"), 404)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (BODY | {"seed": -1}, ["seed"]),
        (BODY | {"sede": 1}, ["sede"]),
        ({"budgets": BODY["budgets"]}, ["task"]),
        (BODY | {"budgets": []}, ["budgets"]),
        (BODY | {"finetune": {"lr": "fast"}}, ["finetune.lr"]),
        (BODY | {"methods": ["exakt"]}, ["methods"]),
        (BODY | {"task": BODY["task"] | {"network": "vgg\ud800"}}, ["task.network"]),
        (BODY | {"seed": -1, "sede\ud800": 1}, ["body"]),
    ],
)
def test_a_wrong_config_is_refused_by_its_fields(service, body, fields):
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = service.ask("POST", "/v1/searches", content=content, headers=headers)
    refused(answer, 422, *fields)


def test_a_misspelt_key_is_answered_with_the_nearest(service):
    answer = service.ask("POST", "/v1/searches", json=BODY | {"finetun": {}})
    assert "did you mean 'finetune'?" in answer.json()["errors"][0]["detail"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"' + b"x" * 100, b"[" * 100_000]
)
def test_a_body_that_is_no_config_is_refused(service, content):
    headers = {"Content-Type": "application/json"}
    answer = service.ask("POST", "/v1/searches", content=content, headers=headers)
    assert answer.status_code in {400, 422}
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_that_is_too_large_is_refused_however_it_comes(service):
    def pieces():
        for _ in range(40):
            yield b" " * (1 << 16)

    for content in (b" " * (2 << 20), pieces()):
        try:
            answer = service.ask("POST", "/v1/searches", content=content)
        except httpx.WriteError:  # the service hung up while it was still being talked to
            continue
        refused(answer, 413)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=many", "limit"),
        ("state=lost", "state"),
        ("name=..%2F..", "name"),
        ("owner=nul%00", "owner"),
    ],
)
def test_a_wrong_query_is_refused_by_its_name(service, query, field):
    refused(service.ask("GET", f"/v1/searches?{query}"), 422, field)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 65, "tab\t", "nul\0"])
def test_a_name_that_is_no_name_is_refused(service, name):
    answer = service.ask("POST", "/v1/searches", params={"name": name}, json=BODY)
    (mistake,) = refused(answer, 422, "name")["errors"]
    assert mistake["detail"].startswith("must match ^[A-Za-z0-9]")
    assert mistake["detail"].endswith(f", got {name!r}")


def test_a_wrong_path_and_a_wrong_method_are_problems_too(service):
    refused(service.ask("GET", "/v1/nothing"), 404)
    refused(service.ask("PUT", "/v1/searches"), 405)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"task": {"data": "digits", "checkpoint": "/etc/passwd"}}, "task.checkpoint"),
        ({"task": {"data": "digits", "checkpoint": "weights.pt"}}, "task.checkpoint"),
        ({"task": {"data": "cifar10", "root": "/", "pretrain": {}}}, "task.root"),
        ({"task": {"factory": "os:system", "arguments": {"command": "id"}}}, "task.factory"),
        ({"task": {"factory": "blobsy:Blobs"}}, "task.factory"),
        ({"task": DETECTOR | {"detector": {"config": "/tmp/evil.py"}}}, "task.detector.config"),
        ({"task": DETECTOR | {"detector": {"config": "mmdet::a/b.py"}}}, "task.detector.config"),
        ({"task": {"model": "os:getcwd", "data": "digits", "pretrain": {}}}, "task.model"),
        (
            {"task": {"network": "timm:resnet18", "pretrained": True, "data": "digits"}},
            "task.network",
        ),
        ({"latency": "/proc/self/environ"}, "latency"),
        ({"trials": {"mlflow": "http://169.254.169.254/"}}, "trials.mlflow"),
        ({"ray": {"address": "10.0.0.1:6379"}}, "ray.address"),
        ({"trials": {"cpus": 2, "workers": 3}, "finetune": {"batch_size": 3}}, "trials.cpus"),
    ],
)
def test_a_config_names_no_file_and_no_code_that_is_not_allowed(service, change, field):
    refused(service.ask("POST", "/v1/searches", json=BODY | change), 403, field)


def test_what_the_operator_allows_is_allowed_and_links_do_not_lead_out(tmp_path):
    from search.config import SearchConfig  # noqa: PLC0415

    inside, outside = tmp_path / "data", tmp_path / "secret.pt"
    inside.mkdir()
    outside.write_text("")
    (inside / "weights.pt").write_text("")
    (inside / "link.pt").symlink_to(outside)
    policy = Policy((inside,), ("blobs",))

    def asked(task):
        policy.refuse(SearchConfig.model_validate(BODY | {"task": task}))

    asked({"factory": "blobs.tasks:make", "arguments": {"n": ["any"]}})
    asked({"data": "digits", "checkpoint": str(inside / "weights.pt")})
    for path in ("link.pt", "../secret.pt", "x\0"):
        with pytest.raises(PolicyError, match="must be a path within"):
            asked({"data": "digits", "checkpoint": f"{inside}/{path}"})


def test_every_string_of_a_config_is_judged():
    """A key that is new to the config must be put into one of the policy's lists."""
    from search.config import SearchConfig  # noqa: PLC0415

    schema = SearchConfig.model_json_schema()
    found = set()

    def walk(node, path):
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        for key, inner in node.get("properties", {}).items():
            walk(inner, f"{path}.{key}".strip("."))
        for inner in [*node.get("anyOf", []), *filter(None, [node.get("items")])]:
            walk(inner, path)
        if node.get("type") == "string" and "enum" not in node and "const" not in node:
            found.add(path)

    walk(schema, "")
    judged = {
        "latency",
        "task.checkpoint",
        "task.root",
        "task.search_indices",
        "task.factory",
        "task.batches",
        "task.cache",
        "task.detector.config",
        "task.detector.root",
        "task.loss",
        "task.metric",
        "task.model",
        "methods",
        "study.candidate",
        "task.network",
        "weights.keep",
        "weights.tie",
        "activations.keep",
        "activations.tie",
        "trials.mlflow",
        "ray.address",
    }
    assert {path for path in found if not path.startswith("study.space")} == judged


def run_of(service, search):
    run = service.store.folder(search).run
    (run / "best.1").mkdir(parents=True)
    (run / "best.1" / "allocation.json").write_text("{}")
    (run / "best").symlink_to("best.1")
    (run / "loop").symlink_to(".")
    (run / "best.1" / "link").symlink_to("/etc/passwd")
    (run / "up").symlink_to("..")
    (run / "report.html").write_text("<script>alert(1)</script>")
    (run / "run.lock").write_text("1")
    (run / ".hidden").write_text("1")
    (run / "link").symlink_to("/etc/passwd")
    return run


def test_artefacts_are_listed_and_downloaded(service):
    search = service.submit()
    run_of(service, search)
    listed = service.ask("GET", f"/v1/searches/{search}/artefacts").json()
    assert [one["path"] for one in listed] == ["best/allocation.json", "report.html"]
    found = service.ask("GET", f"/v1/searches/{search}/artefacts/best/allocation.json")
    assert found.content == b"{}"
    page = service.ask("GET", f"/v1/searches/{search}/artefacts/report.html")
    assert page.headers["content-security-policy"].startswith("sandbox")


@pytest.mark.parametrize(
    "path",
    [
        "..%2Frecord.json",
        "best%2F..%2F..%2Frecord.json",
        "%2Fetc%2Fpasswd",
        "..%5Crecord.json",
        "%2e%2e/record.json",
        "link",
        "best/link",
        "up/record.json",
        "loop/report.html",
        "best.1/allocation.json",
        "run.lock",
        ".hidden",
        "best",
        "x%00",
        "x" * 5000,
        "",
    ],
)
def test_no_name_leads_out_of_the_run(service, path):
    search = service.submit()
    run_of(service, search)
    answer = service.ask("GET", f"/v1/searches/{search}/artefacts/{path}")
    assert answer.status_code in {404, 307}, answer.text  # an empty name is the list's own address
    assert b"owner" not in answer.content


def test_a_result_is_there_when_it_is(service):
    search = service.submit()
    refused(service.ask("GET", f"/v1/searches/{search}/result"), 409)
    service.end(search)
    run = service.store.folder(search).run
    run.mkdir()
    (run / "summary.json").write_text('{"name": "n"}')
    assert service.ask("GET", f"/v1/searches/{search}/result").json() == {"name": "n"}
    refused(service.ask("POST", f"/v1/searches/{search}/cancel"), 409)
    refused(service.ask("POST", f"/v1/searches/{search}/resume"), 409)


def test_only_what_has_ended_is_deleted(service):
    search = service.submit()
    refused(service.ask("DELETE", f"/v1/searches/{search}"), 409)
    service.end(search, "failed")
    assert service.ask("DELETE", f"/v1/searches/{search}").status_code == 204
    refused(service.ask("GET", f"/v1/searches/{search}"), 404)


def messages(service, search, seen=None):
    headers = {} if seen is None else {"Last-Event-ID": seen}
    found, fields = [], {}
    answer = service.ask("GET", f"/v1/searches/{search}/events", headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    for line in answer.text.splitlines():
        name, _, value = line.partition(":")
        if line:
            fields[name] = value.strip()
        elif "data" in fields:
            found.append(fields)
            fields = {}
    return found


def test_events_stream_to_the_end_and_go_on_from_any_of_them(service):
    search = service.submit()
    folder = service.store.folder(search)
    folder.run.mkdir()
    log = EventLog(folder.events)
    for done in range(3):
        log.emit("curvature", "progress", done=done, total=3, unit="probes")

    def later():
        time.sleep(0.5)
        log.emit("curvature", "finished")
        service.end(search)

    thread = threading.Thread(target=later)
    thread.start()
    *events, end = messages(service, search)
    thread.join()
    assert [json.loads(one["data"])["kind"] for one in events] == ["progress"] * 3 + ["finished"]
    assert end["event"] == "end"
    assert json.loads(end["data"])["state"] == "succeeded"
    for index, event in enumerate(events):
        assert messages(service, search, event["id"]) == [*events[index + 1 :], end]
    # Inside of an event: on from the next.
    assert messages(service, search, str(int(events[0]["id"]) - 3)) == [*events[1:], end]


@pytest.mark.parametrize("seen", ["-1", "last", "9" * 40])
def test_an_id_that_no_event_can_have_is_refused(service, seen):
    search = service.submit()
    answer = service.ask("GET", f"/v1/searches/{search}/events", headers={"Last-Event-ID": seen})
    refused(answer, 422, "last-event-id")


def test_an_event_that_a_kill_cut_short_is_left_out(service):
    search = service.submit()
    folder = service.store.folder(search)
    folder.run.mkdir()
    folder.events.write_text('{"time": 1, "sta\n{"time": 2}\n{"ti')
    service.end(search)
    assert [one.get("event", one["data"]) for one in messages(service, search)] == [
        '{"time": 2}',
        "end",
    ]


def test_logs_have_an_end_and_can_be_followed(service):
    search = service.submit()
    service.store.change(search, lambda r: r.model_copy(update={"attempt": 1, "state": "running"}))
    path = service.store.folder(search).log(1)
    path.parent.mkdir()
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    url = f"/v1/searches/{search}/logs"
    assert service.ask("GET", f"{url}?tail=2").text == "line 98\nline 99\n"
    refused(service.ask("GET", f"{url}?attempt=2"), 404)

    def later():
        time.sleep(0.5)
        with path.open("a") as file:
            file.write("the end\n")
        service.end(search, "failed")

    thread = threading.Thread(target=later)
    thread.start()
    assert service.ask("GET", f"{url}?tail=1&follow=true").text == "line 99\nthe end\n"
    thread.join()


def test_too_many_requests_are_put_off(tmp_path):
    with Service(tmp_path, per_second=0.01, burst=3) as service:
        answers = [service.ask("GET", "/v1/health", None) for _ in range(4)]
        assert [one.status_code for one in answers[:3]] == [200] * 3
        refused(answers[3], 429)
        assert int(answers[3].headers["retry-after"]) >= 1


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
def test_a_rate_is_kept_whatever_the_pauses(pauses):
    rate, now, passed = Rate(2.0, 5), 0.0, 0
    for pause in pauses:
        now += pause
        passed += rate.wait("a", now) == 0
    assert passed <= 5 + 2 * now + 1e-9
    assert rate.wait("b", now) == 0  # others do not wait for it


def test_without_login_everybody_is_admin_but_only_by_a_loopback_name(tmp_path):
    with Service(tmp_path, login=False) as service:
        assert service.ask("GET", "/v1/me", None).json() == {"name": "local", "is_admin": True}
        # A page of another site, whose name was made to mean this machine.
        headers = {"Host": "evil.example:80"}
        refused(service.ask("GET", "/v1/me", None, headers=headers), 400)


def test_the_client_speaks_the_services_words(service):
    with Client(service.url, service.secrets["ann"]) as client:
        with pytest.raises(InputError, match="Not Found"):
            client.get("../../v1/me")
        search = service.submit()
        assert client.get(search).state == "queued"
        assert client.page(name="search").searches[0].owner == "ann"
        with pytest.raises(InputError, match="must have succeeded"):
            client.result(search)
        service.store.folder(search).write(Outcome(attempt=0, ended="succeeded"))
        service.end(search)
        assert [one.state for one in client.events(search)] == ["succeeded"]
    with Client(service.url, "wrong") as client, pytest.raises(InputError, match="not known"):
        client.page()
    with Client("http://127.0.0.1:9", None) as client, pytest.raises(InputError, match="--url"):
        client.page()


def test_the_description_is_open_and_names_every_route(service):
    found = service.ask("GET", "/v1/openapi.json", None).json()
    assert {path.replace("{search}", "{}") for path in found["paths"]} >= {
        path.replace("config.yaml", "{path}") for _, path in PATHS
    }
    assert "SearchConfig" in found["components"]["schemas"]


@pytest.fixture(scope="module")
def described(service):
    return schemathesis.openapi.from_dict(service.app.openapi())


OPERATIONS = [
    ("GET", "/v1/health"),
    *((method, path.replace("config.yaml", "{path}")) for method, path in PATHS),
]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_request_makes_the_service_fail(service, described, method, path, data):
    case = data.draw(described[path.replace("{}", "{search}")][method].as_strategy())
    if "search" in case.path_parameters and data.draw(st.booleans()):
        ended = service.submit()
        service.end(ended, data.draw(st.sampled_from(["succeeded", "failed", "cancelled"])))
        case.path_parameters["search"] = ended
    headers = {"Authorization": f"Bearer {service.secrets['ann']}"}
    answer = case.call(base_url=service.url, headers=headers)
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert answer.headers["content-type"][0] == "application/problem+json"
