# SPDX-License-Identifier: Apache-2.0
"""What a run found is judged: faults excuse what they can have caused, leaks and growth show."""

import json

import pytest

from tests.soak import report
from tests.soak.faults import KILL, ROLL, STOP, TERM, Window
from tests.soak.load import Outcome
from tests.soak.reference import Verdict
from tests.soak.watch import Rest, Sample, Watch

LOST = "connection: ReadError"
GIVEN_UP = "503: No available workers: 1 prefill, 0 decode"


def outcome(start=0.0, end=1.0, verdict=Verdict.FAILED, detail=LOST, kind="greedy"):
    return Outcome(kind, f"{kind}-1-1", verdict, start, end, detail)


def sample(t, rss=100.0, fds=50, threads=20, process=1):
    return Sample(t, "decode-0", process, rss, fds, threads)


@pytest.mark.parametrize("what", [KILL, TERM])
def test_a_server_that_is_away_excuses_what_met_it(what):
    window = Window(what, "decode-0", 100.0, 200.0)
    assert report.excuse(outcome(90, 101), [window]) == f"{what} decode-0"
    assert report.excuse(outcome(150, 151), [window])
    assert report.excuse(outcome(200 + report.ROUTER_SECONDS - 1, 300), [window])
    assert report.excuse(outcome(90, 99), [window]) is None
    assert report.excuse(outcome(200 + report.ROUTER_SECONDS + 1, 300), [window]) is None
    assert report.excuse(outcome(150, 151), []) is None


def test_a_stopped_server_excuses_only_that_the_router_gave_it_up():
    window = Window(STOP, "prefill-0", 100.0, 110.0)
    assert report.excuse(outcome(101, 102), [window]) is None
    assert report.excuse(outcome(101, 102, detail=GIVEN_UP), [window]) == "stop prefill-0"


def test_a_rolling_restart_excuses_nothing():
    window = Window(ROLL, "prefill-0", 100.0, 110.0)
    assert report.excuse(outcome(101, 102), [window]) is None
    assert report.excuse(outcome(101, 102, detail=GIVEN_UP), [window]) is None


def test_a_run_that_was_interrupted_misses_its_goals():
    found = report.summary({}, [], [], Watch([]), [], [], [], 0, whole=False)
    assert [goal["name"] for goal in found["goals"] if goal["met"] is False] == ["ran to its end"]


def test_a_fault_that_lasts_excuses_until_now():
    assert report.excuse(outcome(500, 501), [Window(KILL, "decode-0", 100.0)])


def test_leaks_are_what_is_left_and_what_grew_from_rest_to_rest():
    quiet = [Rest(t, [sample(t)], []) for t in (0.0, 300.0)]
    assert report.leaks(quiet) == []
    left = [quiet[0], Rest(300.0, [sample(300)], ["decode-0: kv_usage 0.1"])]
    assert report.leaks(left) == ["rest 1: decode-0: kv_usage 0.1"]
    more = sample(300, fds=51 + report.SPARE_FDS, threads=21 + report.SPARE_THREADS)
    assert len(report.leaks([quiet[0], Rest(300.0, [more], [])])) == 2
    restarted = sample(300, fds=500, process=2)
    assert report.leaks([quiet[0], Rest(300.0, [restarted], [])]) == []


def test_growth_is_found_beside_a_warm_up_and_noise():
    def life(mb_per_hour):
        return [
            sample(t, 100 + min(t, 300) + mb_per_hour * t / 3600 + (0.2 if t % 10 else -0.2))
            for t in range(0, 1800, 5)
        ]

    assert report.slopes(life(0.0))[0]["mb_per_hour"] == pytest.approx(0, abs=0.5)
    assert report.slopes(life(30.0))[0]["mb_per_hour"] == pytest.approx(30, abs=1)
    assert report.slopes(life(30.0)[:60]) == []


def goals(outcomes=(), windows=(), rests=(), samples=(), died=(), failed_starts=()):
    watch = Watch([])
    watch.rests, watch.samples = list(rests), list(samples)
    found = report.summary({}, outcomes, windows, watch, [], failed_starts, died, len(outcomes))
    return {goal["name"]: goal["met"] for goal in found["goals"]}, found


def test_a_good_run_meets_every_goal_that_was_measured():
    met, _ = goals([outcome(verdict=Verdict.EQUAL), outcome(verdict=Verdict.SHAPED)])
    assert met.pop("RSS slope, MB an hour") is None
    assert all(met.values())


@pytest.mark.parametrize(
    ("goal", "changes"),
    [
        ("wrong", {"outcomes": [outcome(verdict=Verdict.WRONG)]}),
        ("never ended", {"outcomes": [outcome(verdict=Verdict.NEVER)]}),
        ("failed without a fault", {"outcomes": [outcome()]}),
        ("requests", {"outcomes": [outcome(verdict=Verdict.LEFT)]}),
        ("left behind", {"rests": [Rest(0.0, [], ["prefill-0: staging_bytes 7"])]}),
        ("servers die by themselves", {"died": ["decode-0"]}),
        ("starts that fail", {"failed_starts": ["prefill-0: Device is busy"]}),
        (
            "seeded answers that differ",
            {"outcomes": [outcome(verdict=Verdict.SEEDED_DIFFERS, kind="seeded")] * 2},
        ),
        (
            "RSS slope, MB an hour",
            {"samples": [sample(float(t), 100 + t * 0.01) for t in range(0, 1800, 5)]},
        ),
    ],
)
def test_each_goal_can_be_missed(goal, changes):
    assert goals(**changes)[0][goal] is False


def test_report_and_picture_are_written(tmp_path):
    outcomes = [outcome(t, t + 1, verdict) for t, verdict in enumerate(Verdict)]
    windows = [Window(KILL, "decode-0", 1.0, 2.0), Window(STOP, "prefill-0", 3.0)]
    rests = [Rest(5.0, [sample(5.0)], [])]
    _, found = goals(outcomes, windows, rests, [sample(1.0), sample(2.0)])
    report.write(tmp_path, found, outcomes)
    assert json.loads((tmp_path / "soak.json").read_text())["requests"] == len(outcomes)
    assert (tmp_path / "soak.png").stat().st_size > 10_000
    assert "MISS wrong: 1" in report.text(found)
    assert report.read(tmp_path)["verdicts"] == found["verdicts"]
    report.remove(tmp_path)
    assert report.read(tmp_path) is None
