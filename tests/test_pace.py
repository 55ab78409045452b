"""Rates and times left, and the lines that show them."""

import io

import pytest
from rich.console import Console

from search.events import Event
from search.pace import Pacemaker
from search.terminal import LiveView


def progress(time: float, done: float, total: float, unit: str) -> Event:
    return Event(time, "agreement", "progress", done=done, total=total, unit=unit)


def test_a_step_that_takes_longer_than_is_looked_back_has_a_rate():
    follow = Pacemaker()
    assert follow(progress(0, 0, 9, "networks")) is None
    for i in range(1, 5):
        found = follow(progress(400 * i, i, 9, "networks"))
        assert found is not None
        assert found.rate == pytest.approx(1 / 400)
        assert found.left == pytest.approx(400 * (9 - i))


def test_a_rate_is_of_late():
    follow = Pacemaker()
    for i in range(100):
        follow(progress(10.0 * i, i, 1000, "probes"))
    for i in range(121):
        found = follow(progress(990.0 + i, 99 + 2 * i, 1000, "probes"))
    assert found is not None
    assert found.rate == pytest.approx(2)


def test_who_stands_still_has_none():
    follow = Pacemaker()
    follow(progress(0, 3, 9, "epochs"))
    assert follow(progress(60, 3, 9, "epochs")) is None


def test_each_count_of_a_stage_has_a_pace_of_its_own():
    """Scores, then trainings, then tests: the first must not slow down the last."""
    shown = io.StringIO()
    view = LiveView(Console(file=shown, width=100))
    for i in range(3):
        view(progress(1000.0 + 10 * i, i, 2, "scores"))
    for i in range(3):
        view(progress(2000.0 + 500 * i, i, 2, "epochs"))
    for i in range(3):
        view(progress(3010.0 + 20 * i, i, 2, "networks"))
    lines = [" ".join(line.split()[2:]) for line in shown.getvalue().splitlines()]
    assert lines == [
        "0/2 scores",
        "1/2 scores 10 s/score, 0:10 left",
        "2/2 scores 10 s/score, 0:00 left",
        "0/2 epochs",
        "1/2 epochs 500 s/epoch, 8:20 left",
        "2/2 epochs 500 s/epoch, 0:00 left",
        "0/2 networks",
        "1/2 networks 20 s/network, 0:20 left",
        "2/2 networks 20 s/network, 0:00 left",
    ]
