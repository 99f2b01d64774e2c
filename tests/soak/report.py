# SPDX-License-Identifier: Apache-2.0
"""What a run found: numbers, goals, and a picture over time."""

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.soak.faults import ROLL, STOP, Window
from tests.soak.load import Outcome
from tests.soak.reference import GOOD, Verdict
from tests.soak.servers import HEALTH_SECONDS
from tests.soak.watch import Rest, Sample, Watch

ROUTER_SECONDS = 15.0 + HEALTH_SECONDS
"""After a server is back, the router learns of it only with its next look."""
SPARE_FDS, SPARE_THREADS = 8, 4
"""More than at the first rest without being a leak: a connection between two instances, a pool."""
SLOPE_MB_PER_HOUR = 1.0
SEEDED_SHARE = 0.005
"""Seeded answers that may differ: two candidates may be as near in a sample as two best tokens."""
MIN_SPAN_SECONDS = 540.0
RESOLUTION_MB = 2.0
"""Growth that cannot be told from an allocator's rounding in a run of minutes."""


@dataclass(frozen=True)
class Goal:
    """One of the things a run has to show; `met` is None where it could not be measured."""

    name: str
    wanted: str
    found: str
    met: bool | None


def excuse(outcome: Outcome, windows: Sequence[Window]) -> str | None:
    """The fault that explains a failed request; None: nothing does.

    A killed or terminated server may fail what it was answering, and what is sent to it until the
    router has looked again. A stopped one may only make the router give it up: what was sent to
    it before has to be answered. A rolling restart excuses nothing.
    """
    for window in windows:
        if window.what == ROLL or not window.overlaps(outcome.start, outcome.end, ROUTER_SECONDS):
            continue
        given_up = "No available workers" in outcome.detail
        if window.what != STOP or given_up:
            return f"{window.what} {window.server}"
    return None


def slopes(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Growth of every process's memory after the first third of its life, MB an hour
    (Theil-Sen), where it lived long enough to tell."""
    found = []
    for (server, process), own in _by_process(samples).items():
        # Short of the last samples: a server that is on its way out has lost children.
        own = own[:-1]
        settled = [s for s in own if s.t >= own[0].t + (own[-1].t - own[0].t) / 3] if own else []
        if len(settled) < 3 or (span := settled[-1].t - settled[0].t) < MIN_SPAN_SECONDS:
            continue
        thinned = settled[:: max(len(settled) // 150, 1)]
        pairs = itertools.combinations(thinned, 2)
        slope = statistics.median((b.rss_mb - a.rss_mb) / (b.t - a.t) for a, b in pairs) * 3600
        found.append(
            {
                "server": server,
                "process": process,
                "span_s": round(span),
                "mb_per_hour": round(slope, 2),
                "grown_mb": round(slope * span / 3600, 2),
            }
        )
    return found


def leaks(rests: Sequence[Rest]) -> list[str]:
    """What rests found left, and what a process has more of at its last rest than at its first."""
    found = [f"rest {index}: {left}" for index, rest in enumerate(rests) for left in rest.left]
    for (server, _), own in _by_process([s for rest in rests for s in rest.samples]).items():
        first, last = own[0], own[-1]
        if last.fds > first.fds + SPARE_FDS:
            found.append(f"{server}: {first.fds} file descriptors became {last.fds}")
        if last.threads > first.threads + SPARE_THREADS:
            found.append(f"{server}: {first.threads} threads became {last.threads}")
    return found


def summary(
    settings: dict[str, Any],
    outcomes: Sequence[Outcome],
    windows: Sequence[Window],
    watch: Watch,
    injected: Sequence[dict[str, Any]],
    failed_starts: Sequence[str],
    died: Sequence[str],
    wanted_requests: int,
    whole: bool = True,
) -> dict[str, Any]:
    """The whole report, as it is written."""
    failed = [outcome for outcome in outcomes if outcome.verdict is Verdict.FAILED]
    excuses = [excuse(outcome, windows) for outcome in failed]
    unexcused = [o for o, why in zip(failed, excuses, strict=True) if why is None]
    kinds = sorted({outcome.kind for outcome in outcomes})
    memory = slopes(watch.samples)
    goals = _goals(outcomes, unexcused, leaks(watch.rests), memory, wanted_requests)
    goals.append(Goal("servers die by themselves", "0", str(len(died)), not died))
    goals.append(
        Goal("starts that fail", "0", str(len(failed_starts)), not failed_starts),
    )
    goals.append(Goal("ran to its end", "yes", "yes" if whole else "no", whole))
    return {
        "settings": settings,
        "goals": [asdict(goal) for goal in goals],
        "requests": len(outcomes),
        "verdicts": dict(Counter(str(outcome.verdict) for outcome in outcomes)),
        "kinds": {
            kind: dict(Counter(str(o.verdict) for o in outcomes if o.kind == kind))
            for kind in kinds
        },
        "seconds": {
            kind: _quantiles([o.end - o.start for o in outcomes if o.kind == kind and _good(o)])
            for kind in kinds
        },
        "wrong": [asdict(o) for o in outcomes if o.verdict is Verdict.WRONG],
        "never_ended": [asdict(o) for o in outcomes if o.verdict is Verdict.NEVER],
        "near_ties": [asdict(o) for o in outcomes if o.verdict is Verdict.NEAR_TIE],
        "seeded_differs": [asdict(o) for o in outcomes if o.verdict is Verdict.SEEDED_DIFFERS],
        "failed": [asdict(o) for o in unexcused],
        "failed_by_faults": dict(Counter(why for why in excuses if why)),
        "server_faults": [asdict(window) for window in windows],
        "transport_faults": dict(Counter(note["fault"] for note in injected)),
        "failed_starts": list(failed_starts),
        "died": list(died),
        "rests": [asdict(rest) for rest in watch.rests],
        "memory": memory,
        "counted": watch.counted(),
        "samples": [asdict(sample) for sample in watch.samples],
    }


def _good(outcome: Outcome) -> bool:
    return outcome.verdict in GOOD


def _goals(
    outcomes: Sequence[Outcome],
    unexcused: Sequence[Outcome],
    left: Sequence[str],
    memory: Sequence[dict[str, Any]],
    wanted_requests: int,
) -> list[Goal]:
    count = Counter(outcome.verdict for outcome in outcomes)
    answered = sum(count[verdict] for verdict in GOOD) + count[Verdict.WRONG]
    seeded = sum(o.kind == "seeded" and _good(o) for o in outcomes)
    differ = count[Verdict.SEEDED_DIFFERS]
    steepest = max((row["mb_per_hour"] for row in memory), default=None)
    if steepest is None:
        flat = None
    elif all(row["mb_per_hour"] < SLOPE_MB_PER_HOUR for row in memory):
        flat = True
    else:
        steep = [row for row in memory if row["mb_per_hour"] >= SLOPE_MB_PER_HOUR]
        flat = False if any(row["grown_mb"] >= RESOLUTION_MB for row in steep) else None
    return [
        Goal("requests", f">= {wanted_requests}", str(answered), answered >= wanted_requests),
        Goal("wrong", "0", str(count[Verdict.WRONG]), not count[Verdict.WRONG]),
        Goal(
            "seeded answers that differ",
            f"<= {SEEDED_SHARE:.1%}",
            f"{differ} of {seeded}",
            differ <= max(1, seeded * SEEDED_SHARE),
        ),
        Goal("never ended", "0", str(count[Verdict.NEVER]), not count[Verdict.NEVER]),
        Goal("failed without a fault", "0", str(len(unexcused)), not unexcused),
        Goal("left behind", "nothing", "; ".join(left) or "nothing", not left),
        Goal(
            "RSS slope, MB an hour",
            f"< {SLOPE_MB_PER_HOUR:g}",
            "no process lived long enough" if steepest is None else f"{steepest:g}",
            flat,
        ),
    ]


def _quantiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3), "max": round(max(seconds), 3)}


def _by_process(samples: Sequence[Sample]) -> dict[tuple[str, int], list[Sample]]:
    groups: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.server, sample.process), []).append(sample)
    return groups


def text(report: dict[str, Any]) -> str:
    """The goals, and what is behind those that were missed, for a terminal."""
    marks = {True: "ok  ", False: "MISS", None: "?   "}
    lines = [
        f"{marks[goal['met']]} {goal['name']}: {goal['found']} (wanted {goal['wanted']})"
        for goal in report["goals"]
    ]
    lines += [
        "",
        f"verdicts: {report['verdicts']}",
        f"faults in transit: {report['transport_faults']}",
    ]
    lines.append(f"failed by server faults: {report['failed_by_faults']}")
    for name in ("wrong", "never_ended", "failed"):
        causes = Counter((o["kind"], o["detail"][:160]) for o in report[name])
        lines += [f"{name}: {n} x {kind}: {what}" for (kind, what), n in causes.most_common(12)]
    return "\n".join(lines)


def write(folder: Path, report: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """`soak.json` and `soak.png` into `folder`."""
    (folder / "soak.json").write_text(json.dumps(report, indent=1))
    _draw(folder / "soak.png", report, outcomes)


def read(folder: Path) -> dict[str, Any] | None:
    """What `write` left in `folder`, if anything."""
    path = folder / "soak.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def remove(folder: Path) -> None:
    """Forget the report of an earlier run."""
    for name in ("soak.json", "soak.png"):
        (folder / name).unlink(missing_ok=True)


def _draw(path: Path, report: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    start = min((o.start for o in outcomes), default=0.0)
    figure, axes = plt.subplots(5, 1, figsize=(12, 15), sharex=True, layout="constrained")
    rate, times, memory, handles, staging = axes
    end = max((o.end for o in outcomes), default=start) - start
    width = max(end / 120, 1.0)
    bins = [width * index for index in range(int(end / width) + 2)]
    groups = {
        "answered": [o for o in outcomes if _good(o)],
        "client left": [o for o in outcomes if o.verdict is Verdict.LEFT],
        "failed": [o for o in outcomes if o.verdict is Verdict.FAILED],
        "wrong or never": [o for o in outcomes if o.verdict in (Verdict.WRONG, Verdict.NEVER)],
    }
    colours = ["tab:green", "tab:gray", "tab:orange", "tab:red"]
    rate.hist(
        [[o.end - start for o in group] for group in groups.values()],
        bins=bins,
        weights=[[1 / width] * len(group) for group in groups.values()],
        stacked=True,
        color=colours,
        label=[f"{name} ({len(group)})" for name, group in groups.items()],
    )
    rate.set_ylabel("requests a second")
    rate.legend(loc="upper right", fontsize="small")
    answered = groups["answered"]
    times.plot([o.end - start for o in answered], [o.end - o.start for o in answered], ".", ms=2)
    times.set_yscale("log")
    times.set_ylabel("seconds to the whole answer")
    # The router is small, and a server that starts or ends is no sign of anything.
    engines = [s for s in report["samples"] if s["server"] != "router" and s["gauges"]]
    for axis, value, label in (
        (memory, lambda s: s["rss_mb"], "RSS, MB"),
        (handles, lambda s: s["fds"], "file descriptors"),
        (staging, lambda s: s["gauges"].get("staging_bytes", 0) / 2**20, "staging, MiB"),
    ):
        for index, server in enumerate(sorted({sample["server"] for sample in engines})):
            lives: dict[int, list[dict[str, Any]]] = {}
            for sample in engines:
                if sample["server"] == server:
                    lives.setdefault(sample["process"], []).append(sample)
            # A line a process: what lies between two is nobody's.
            for life, own in enumerate(lives.values()):
                times_of = [sample["t"] - start for sample in own]
                label = "_" if life else server
                axis.plot(times_of, list(map(value, own)), f"C{index}.-", ms=2, label=label, lw=1)
        axis.set_ylabel(label)
        if engines:
            axis.legend(loc="upper right", fontsize="small")
    for axis in axes:
        for window in report["server_faults"]:
            left, right = window["start"] - start, (window["end"] or end + start) - start
            colour = {STOP: "tab:blue", ROLL: "tab:green"}.get(window["what"], "tab:red")
            axis.axvspan(left, right, color=colour, alpha=0.12)
        for rest in report["rests"]:
            axis.axvline(rest["t"] - start, color="black", lw=0.5, ls=":")
    for window in report["server_faults"]:
        note = f"{window['what']} {window['server']}"
        rate.annotate(note, (window["start"] - start, 0), rotation=90, fontsize=7, va="bottom")
    axes[-1].set_xlabel(
        "seconds; red: a server is away, blue: stopped, green: rolling restart, dotted: at rest"
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
