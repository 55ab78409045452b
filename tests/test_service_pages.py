"""The service's pages: who sees what, what a form may do, and how they work in a browser."""

import json
import shutil
import threading
import time

import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import expect, sync_playwright
from test_report import make_summary

from hawq.curvature import UnitSums
from search.artefacts import StageCost
from search.config import SearchConfig
from search.events import Event, EventLog
from search.folder import RunFolder
from search.pipeline import stages_of
from search.report.palette import looks
from search.service.app import Settings, create_app
from search.service.pages.live_searches import learning_curves, read_learned
from search.service.pages.live_traces import (
    Units,
    convergence,
    first_look,
    relative_errors,
    units_so_far,
)
from search.service.pages.live_trials import read_study, study_curve
from search.service.pages.side_by_side import Found, front_figure, rows
from search.service.pages.stages import events_of, pace, stage_names, stages_of_run
from search.service.record import Record
from search.service.store import Store
from search.service.tokens import Tokens
from search.unit_file import UnitFile

HOSTILE = "<img src=x onerror='window.hacked = 1'>"
CONFIG = {
    "task": {"data": "digits", "network": "resnet8", "pretrain": {"epochs": 1}},
    "budgets": [{"average_bits": 3}, {"average_bits": 4}],
    "methods": ["uniform", "hawq-v2", "exact"],
}
PAGES = ["/searches", "/searches/{}", "/compare?search={}&search={}", "/searches/{}/events"]
PAGES += ["/searches/{}/log", "/searches/{}/files/summary.json"]
SUMMARY = make_summary()
COMPARED = {"methods": ["exact", "tpe"], "comparison": {}}
ACTIONS = ["cancel", "resume", "delete"]
WAIT_MS = 60_000


def write_run(folder, *, is_finished):
    """Write what a run leaves behind; one that is not finished has begun its trials."""
    summary, run = SUMMARY, RunFolder(folder.run)
    run.path.mkdir()
    log = EventLog(folder.events)
    stages = ["model", "curvature", "tables", "candidates"] + ["trials", "test"] * is_finished
    for stage in stages:
        run.save(
            stage, {}, getattr(summary, stage), StageCost(stage=stage, seconds=1, cpu_seconds=1)
        )
        log.emit(stage, "started")
        log.emit(stage, "finished", "1.0 s")
    if is_finished:
        (run.path / "summary.json").write_text(summary.model_dump_json(), encoding="utf-8")
        (run.path / "report.html").write_text("<h1>Report</h1>", encoding="utf-8")
    else:
        log.emit("trials", "started")
        log.emit("trials", "progress", done=1, total=40, unit="epochs")
    (folder.path / "attempts").mkdir()
    folder.log(1).write_text("a line of the log\n", encoding="utf-8")


class Service:
    """A service over a store of Ann's searches, with nothing that runs them."""

    def __init__(self, path, **how):
        self.store = Store(path)
        tokens = Tokens(self.store.engine)
        self.secrets = {who: tokens.make(who)[0] for who in ("ann", "bob")}
        settings = Settings(per_second=1e6, burst=10**6, **how)
        config = uvicorn.Config(create_app(self.store, settings), port=0, log_config=None)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._http = httpx.Client(base_url=self.url, timeout=30)
        return self

    def __exit__(self, *_):
        self._http.close()
        self._server.should_exit = True
        self._thread.join()

    def add(self, state, name="digits"):
        record, _ = self.store.submit(SearchConfig.model_validate(CONFIG), owner="ann", name=name)
        write_run(self.store.folder(record.id), is_finished=state == "succeeded")
        changed = {"state": state, "attempt": 1}
        self.store.change(record.id, lambda r: r.model_copy(update=changed))
        return record.id

    def ask(self, path, who="ann", method="GET", **more):
        headers = more.pop("headers", {})
        if who is not None:
            headers = headers | {"Cookie": f"hawq_token={self.secrets.get(who, who)}"}
        return self._http.request(method, path, headers=headers, **more)

    def send(self, path, origin, who="ann"):
        headers = {} if origin is None else {"Origin": origin}
        return self.ask(path, who, "POST", headers=headers)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Service(tmp_path_factory.mktemp("service")) as service:
        service.done = service.add("succeeded")
        service.hostile = service.add("running", HOSTILE)
        yield service


# --- without a browser --------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("who", [None, "nonsense"])
def test_without_a_good_token_every_page_leads_to_the_login(service, path, who):
    answer = service.ask(path.format(service.done, service.hostile), who)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")


@pytest.mark.parametrize("path", PAGES[1:])
def test_a_search_of_somebody_else_is_as_if_it_were_not_there(service, path):
    hidden = service.ask(path.format(service.done, service.hostile), "bob")
    absent = service.ask(path.format("0" * 12, "1" * 12), "bob")
    assert (hidden.status_code, hidden.text) == (404, absent.text)
    assert "There is no such search" in hidden.text


@pytest.mark.parametrize("action", ACTIONS)
def test_a_search_of_somebody_else_cannot_be_acted_upon(service, action):
    before = service.store.get(service.hostile)
    answer = service.send(f"/searches/{service.hostile}/{action}", service.url, "bob")
    assert answer.status_code == 404
    assert service.store.get(service.hostile) == before


def test_a_list_holds_ones_own(service):
    assert service.done in service.ask("/searches").text
    assert service.done not in service.ask("/searches", "bob").text
    assert service.done not in service.ask("/searches?state=failed").text


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("origin", [None, "null", "http://elsewhere.example", "http://127.0.0.1:1"])
def test_a_form_of_another_site_does_nothing(service, action, origin):
    search = service.add("failed" if action != "cancel" else "running")
    before = service.store.get(search)
    assert service.send(f"/searches/{search}/{action}", origin).status_code == 403
    assert service.store.get(search) == before
    service.store.change(search, lambda r: r.model_copy(update={"state": "failed"}))
    service.store.delete(search)


def test_a_form_of_the_pages_acts(service):
    search = service.add("running")
    states = []
    for action in ("cancel", "cancel", "resume"):
        service.send(f"/searches/{search}/{action}", service.url)
        states.append(service.store.get(search).state)
        if action == "cancel":
            service.store.change(search, lambda r: r.model_copy(update={"state": "cancelled"}))
    assert states == ["cancelling", "cancelled", "queued"]
    assert service.send(f"/searches/{search}/delete", service.url).status_code == 409
    service.send(f"/searches/{search}/cancel", service.url)
    answer = service.send(f"/searches/{search}/delete", service.url)
    assert answer.headers["location"] == "/searches"
    assert service.ask(f"/searches/{search}").status_code == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/searches?state=lost", 422),
        ("/searches?after=nothing", 404),
        ("/compare?search={}", 422),
        ("/searches/{}/files/..%2F..%2Frecord.json", 404),
        ("/searches/{}/files/run.lock", 404),
        ("/pages/routes.py", 404),
    ],
)
def test_what_there_is_not_is_refused(service, path, status):
    assert service.ask(path.format(service.done)).status_code == status


def test_a_report_cannot_act_as_a_page_of_the_service(service):
    answer = service.ask(f"/searches/{service.done}/files/report.html")
    assert answer.text == "<h1>Report</h1>"
    assert "sandbox" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/login", *PAGES[:3], "/searches/nowhere"])
def test_pages_run_no_script_but_their_own(service, path):
    answer = service.ask(path.format(service.done, service.hostile))
    assert "script-src 'self';" in answer.headers["content-security-policy"]
    assert "<img" not in answer.text
    assert answer.headers["cache-control"] == "no-store"


def test_a_service_without_login_has_no_login_page(tmp_path):
    with Service(tmp_path, login=False) as service:
        search = service.add("running")
        assert service.ask("/login", None).headers["location"] == "/searches"
        assert search in service.ask("/searches", None).text
        path = f"/searches/{search}/cancel"
        assert service.send(path, "http://elsewhere.example", None).status_code == 403
        assert service.send(path, service.url, None).status_code == 303


# --- what is shown ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{}, {"methods": ["exact", "tpe"]}, {"study": {"trials": 2}}, COMPARED]
)
def test_the_stages_are_those_of_the_pipeline(more):
    config = SearchConfig.model_validate(CONFIG | more)
    assert stage_names(config) == (*(stage.name for stage in stages_of(config)), "report")


@given(st.floats(0.01, 1e4), st.integers(2, 50), st.integers(1, 1000))
def test_a_steady_pace_is_found_whatever_it_was_before(rate, num, left):
    slow = [Event(-1000.0, "trials", "progress", done=0, total=num + left, unit="epochs")]
    steady = [
        Event(i / rate if i else 0.0, "trials", "progress", done=i, total=num + left, unit="epochs")
        for i in range(num)
        if (num - 1 - i) / rate <= 100 or i >= num - 2
    ]
    told = pace(slow + steady)
    amount = float(told.split()[0].replace(",", "").replace("−", "-"))
    assert amount == pytest.approx(rate if " a second" in told else 1 / rate, rel=0.01)
    assert told.endswith(" left")


@given(st.floats(0.01, 50), st.integers(2, 20))
def test_the_pace_is_of_what_is_counted_now(rate, num):
    weights = [Event(0.0, "curvature", "progress", done=500, total=500, unit="units")]
    now = [
        Event(1 + i / rate, "curvature", "progress", done=i, total=2 * num, unit="units")
        for i in range(1, num + 1)
    ]
    assert pace(weights + now) == pace(now) != ""


def test_a_stage_is_running_only_while_its_search_is(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("model", "finished", "1.0 s")
    log.emit("curvature", "started")
    log.emit("curvature", "progress", done=1, total=4, unit="units")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "sta\n{"time": 2}\n{"ti')
    events, names = events_of(tmp_path / "events.jsonl"), ("model", "curvature", "tables")
    states = {
        is_running: [s.state for s in stages_of_run(names, events, is_running=is_running)]
        for is_running in (True, False)
    }
    assert states[True] == ["finished", "running", "waiting"]
    assert states[False] == ["finished", "stopped", "waiting"]


def units_of(samples):
    """Return units of samples of shape (rounds, batches, probes, groups), round by round."""
    return [
        UnitSums.of(batch, 8, values, samples.shape[3])
        for one in samples
        for batch, values in enumerate(one)
    ]


def test_traces_settle_round_by_round_upon_the_mean():
    # Batches differ tenfold: nothing but a whole round is an estimate.
    size = np.array([10.0, 1.0, 0.1])[None, :, None, None]
    samples = 8 * size * (1 + 0.1 * np.random.default_rng(0).normal(size=(4, 3, 8, 2)))
    units = units_of(samples)
    figure = convergence(Units(("first", "second"), units[:-1]))
    expected = np.cumsum(samples.mean(2), 0).mean(1)[:3] / np.arange(1, 4)[:, None] / 8
    for trace in figure.data:
        column = ["first", "second"].index(trace.name)
        np.testing.assert_allclose(trace.y, expected[:, column], rtol=1e-12)
        assert list(trace.x) == [8, 16, 24]
        assert trace.error_y.array[-1] < trace.error_y.array[0]


@pytest.mark.parametrize("num", [0, 1, 2, 3])
def test_traces_of_a_first_round_are_not_drawn(num):
    units = units_of(np.ones((1, 3, 2, 2)))[:num]
    assert convergence(Units(("first", "second"), units)) is None


def test_a_first_look_shows_each_layers_part_of_what_is_back():
    # Two layers and a channel, which is no layer's peer; the second batch is back first.
    samples = np.array([[[3.0, 1.0, 9.0]] * 4, [[5.0, 3.0, 9.0]] * 4])
    units = tuple(UnitSums.of(batch, 8, samples[batch], 2) for batch in (1, 0))
    names = ("first", "second")
    assert first_look(Units(names, units[:1]), "layer") is None
    assert first_look(Units((), units), "layer") is None
    for again in (units, units + units[:1]):  # a second round has begun
        [bars] = first_look(Units(names, again), "layer").data
        assert list(bars.x) == list(names)
        np.testing.assert_allclose(bars.y, [100 * 8 / 12, 100 * 4 / 12])
        np.testing.assert_allclose(bars.error_y.array, 0, atol=1e-5)


def test_a_first_look_has_the_error_of_its_probes():
    # Two probes on each of four batches: the first layer's sum is 8 ± 2, the other's 8 exactly.
    samples = np.array([[1.0, 2.0], [3.0, 2.0]])
    units = tuple(UnitSums.of(batch, 8, samples, 2) for batch in range(4))
    [bars] = first_look(Units(("first", "second"), units), "layer").data
    np.testing.assert_allclose(bars.error_y.array, 100 * 0.5 * 2 / 16)


def test_a_file_of_units_tells_the_layers_to_those_who_watch(tmp_path):
    path = tmp_path / "units.jsonl"
    file = UnitFile(path, "inputs")
    assert units_so_far(path) == Units((), ())
    assert list(file.read(["first", "second"])) == []
    assert units_so_far(path) == Units(("first", "second"), ())
    for index in (4, 1):
        file.append(index, UnitSums.of(index, 8, np.ones((2, 2)), 2))
    with path.open("a") as cut_short:
        cut_short.write('{"index": 2, "ba')
    assert [unit.batch for unit in units_so_far(path).sums] == [1, 4]


def test_units_of_an_earlier_version_are_as_good(tmp_path):
    path, unit = tmp_path / "units.jsonl", UnitSums.of(0, 8, np.ones((2, 2)), 2)
    file = UnitFile(path, "inputs")
    assert list(file.read()) == []
    path.write_text('{"inputs": "inputs"}\n')
    file.append(3, unit)
    assert [index for index, _ in file.read(["first"])] == [3]
    assert first_look(units_so_far(path), "layer") is None


def test_errors_are_those_of_what_is_traced_now():
    def told(done, error):
        measures = {"probes": 2 * done, "relative_error": error}
        return Event(0.0, "curvature", "progress", "", done, 9, "units", measures)

    weights, activations = [told(1, 0.5), told(4, 0.1)], [told(1, 0.4), told(2, 0.3)]
    assert relative_errors(weights[:1], 0.05) is None
    assert relative_errors(weights, 0.05).data[0].y == (0.5, 0.1)
    assert relative_errors(weights + activations, 0.05).data[0].y == (0.4, 0.3)


def test_a_learning_curve_is_the_best_so_far(tmp_path):
    scores = [0.3, 0.2, 0.5, 0.4]
    path = tmp_path / "searches" / "cw-hawq-1-7" / "evaluations.jsonl"
    path.parent.mkdir(parents=True)
    lines = [json.dumps({"inputs": "x"}), *(json.dumps({"score": one}) for one in scores)]
    path.write_text("\n".join(lines) + '\n{"sco', encoding="utf-8")
    [learned] = read_learned(tmp_path, ["3 bits", "4 bits"])
    assert (learned.method, learned.budget, learned.seed) == ("cw-hawq", "4 bits", 7)
    [(budget, figure)] = learning_curves([learned], looks(["cw-hawq"]), "accuracy").items()
    tried, best = figure.data
    assert (budget, list(tried.y), list(best.y)) == ("4 bits", scores, [0.3, 0.3, 0.5, 0.5])


def test_a_study_is_its_trials_and_the_best_that_finished(tmp_path):
    def write(number, name, text):
        folder = tmp_path / "study" / f"{number:03}-{'d' * 12}-{'e' * 8}"
        folder.mkdir(parents=True)
        (folder / name).write_text(text, encoding="utf-8")

    trial = SUMMARY.trials.trials[0]
    for number, score, status in [(0, 0.5, "finished"), (1, 0.9, "stopped"), (3, 0.4, "finished")]:
        epochs = [trial.epochs[-1].model_copy(update={"search_score": score})]
        found = trial.model_copy(update={"epochs": epochs, "status": status})
        write(number, "result.json", found.model_dump_json(exclude={"seed"}))
    write(2, "progress.json", '{"done": 1.5, "total": 4, "score": 0.6}')
    write(4, "progress.json", '{"done": 0.1, "total": 4, "score": null}')
    tried = read_study(tmp_path)
    figure = study_curve(tried, None, num_trials=9, name="accuracy")
    best, finished, others = figure.data
    assert (list(best.x), list(best.y)) == ([0, 3], [50, 50])
    assert (list(finished.x), list(finished.y)) == ([0, 3], [50, 40])
    assert (list(others.x), list(others.y)) == ([1, 2], [90, 60])
    assert others.text[1] == "trial 2, epoch 1.5 of 4"
    assert figure.layout.xaxis.range == (-0.5, 8.5)


def found_of(sizes_and_scores):
    candidate = SUMMARY.candidates.candidates[0]
    candidates = tuple(
        candidate.model_copy(
            update={"digest": f"{i}", "method": f"m{i}", "costs": {"weight_bits": size}}
        )
        for i, (size, _) in enumerate(sizes_and_scores)
    )
    scored = {f"{i}": score for i, (_, score) in enumerate(sizes_and_scores)}
    record = Record(id="0" * 12, name="one", owner="ann", submitted=0, changed=0)
    return Found(record, candidates, {}, scored, None, "accuracy")


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_line_of_a_search_joins_what_nothing_of_it_beats(points):
    points = [(8 << 20 + size, score / 10) for size, score in points]
    line, marks = front_figure([found_of(points)]).data
    best = {
        (size, score)
        for size, score in points
        if not any((s <= size and t > score) or (s < size and t >= score) for s, t in points)
    }
    assert len(marks.x) == len(points)
    assert list(zip(line.x, line.y, strict=True)) == sorted(
        (size / 8 / 2**20, 100 * score) for size, score in best
    )


def test_searches_stand_side_by_side_under_each_budget():
    first, second = found_of([(800, 0.5), (400, 0.25)]), found_of([(800, 0.75)])
    [(budget, found)] = rows([first, second]).items()
    assert budget == SUMMARY.candidates.candidates[0].budget
    assert [row.method for row in found] == ["m0", "m1"]
    assert [cell.score for cell in found[0].cells] == ["50.00 % so far", "75.00 % so far"]
    assert [cell.score for cell in found[1].cells] == ["25.00 % so far", ""]


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(service, browser):
    """Open a page as Ann; what it writes to the console fails the test."""
    opened, said = [], []

    def visit(path, **how):
        context = browser.new_context(base_url=service.url, **how)
        context.set_default_timeout(WAIT_MS)
        opened.append(context)
        cookie = {"name": "hawq_token", "value": service.secrets["ann"], "url": service.url}
        context.add_cookies([cookie])
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path)
        return page

    yield visit
    for context in opened:
        context.close()
    assert not said


@pytest.mark.browser
def test_a_person_logs_in_and_out(service, browser):
    with browser.new_context(base_url=service.url) as context:
        page = context.new_page()
        page.goto("/")
        page.get_by_label("Token").fill("hawq_nonsense")
        page.keyboard.press("Enter")
        assert page.get_by_role("alert").inner_text() == "The token is not known."
        page.get_by_label("Token").fill(service.secrets["ann"])
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Searches").wait_for()
        [cookie] = context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["expires"]) == (True, "Strict", -1)
        page.get_by_role("button", name="Log out").click()
        page.get_by_role("heading", name="Log in").wait_for()
        assert context.cookies() == []


@pytest.mark.browser
def test_a_hostile_name_is_text(service, visit):
    page = visit("/searches")
    page.get_by_role("link", name=HOSTILE).click()
    assert page.get_by_role("heading", level=1).inner_text() == HOSTILE
    assert page.evaluate("window.hacked") is None


@pytest.mark.browser
def test_a_finished_search_shows_its_stages_figures_and_files(service, visit):
    page = visit(f"/searches/{service.done}")
    stages = page.get_by_role("listitem").filter(has_text="finished")
    assert stages.first.inner_text().split()[:2] == ["model", "finished"]
    figures = page.locator("[data-figure]")
    assert page.locator("[data-figure] .main-svg").count() >= figures.count() >= 4
    titles = page.locator(".panel h3").all_inner_texts()
    assert titles[:2] == ["Size and score", "Weights: bits of each layer"]
    page.get_by_role("button", name="uniform").click()
    hidden = "id => document.getElementById(id).data.filter(t => t.visible === false).length"
    assert page.evaluate(hidden, "front") == 1
    with page.expect_download() as download:
        page.get_by_role("link", name="summary.json").click()
    assert json.loads(download.value.path().read_text())["name"] == "resnet20-cifar10"


@pytest.mark.browser
def test_two_searches_are_compared_by_the_keyboard_alone(service, visit):
    page = visit("/searches")
    seen, focused = [], "document.activeElement.id || document.activeElement.innerText"
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(focused))
        if seen[-1] in {f"tick-{service.done}", f"tick-{service.hostile}"}:
            page.keyboard.press("Space")
        if seen[-1] == "compare":
            break
    assert seen[0] == "Skip to content"
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="2 searches side by side").wait_for()
    assert page.get_by_role("rowheader", name="hawq-v2").count() == 2
    page.locator("#fronts .main-svg").first.wait_for()


@pytest.mark.browser
def test_a_phone_needs_no_sideways_move_in_light_and_dark(service, visit):
    page = visit("/login", viewport={"width": 390, "height": 844})
    papers = []
    for path in ["/login", *PAGES[:3]]:
        page.goto(path.format(service.done, service.hostile))
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") == 390, (path, scheme)
            papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert papers == ["rgb(255, 255, 255)", "rgb(18, 23, 29)"] * 4
    # Figures are drawn again, which takes a moment.
    for scheme, ink in (("light", "rgb(31, 41, 51)"), ("dark", "rgb(227, 232, 238)")):
        page.emulate_media(color_scheme=scheme)
        expect(page.locator("#fronts .xtick text").first).to_have_css("fill", ink)


@pytest.mark.browser
def test_a_running_search_is_seen_to_go_on(service, visit):
    search = service.add("running")
    folder = service.store.folder(search)
    page = visit(f"/searches/{search}")
    trials = page.get_by_role("listitem").filter(has_text="trials")
    assert "1 of 40 epochs" in trials.inner_text()
    num_points = "document.getElementById('front')?.data?.flatMap(t => t.x).length"
    assert page.evaluate(num_points) is None  # nothing is scored, and no empty figure drawn
    page.evaluate("window.stayed = true")
    trial = SUMMARY.trials.trials[0]
    (folder.run / "trials" / f"{trial.digest}-0").mkdir(parents=True)
    text = trial.model_dump_json(exclude={"seed"})
    (folder.run / "trials" / f"{trial.digest}-0" / "result.json").write_text(text)
    EventLog(folder.events).emit("trials", "progress", done=20, total=40, unit="epochs")
    trials.filter(has_text="20 of 40 epochs").wait_for()
    page.wait_for_function(f"{num_points} === 1")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("cancelling").first.wait_for()
    assert service.store.get(search).state == "cancelling"
    service.store.change(search, lambda r: r.model_copy(update={"state": "cancelled"}))
    page.locator("#ask-delete").click()
    page.get_by_role("button", name="Delete for ever").click()
    page.wait_for_url("**/searches")
    assert search not in page.content()
