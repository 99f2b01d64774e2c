# SPDX-License-Identifier: Apache-2.0
"""`lynx bench e2e --resume`: what a report holds is kept, and only the rest is measured."""

import contextlib
import dataclasses
import json

import pytest

from lynx_connector.bench.e2e import measure, runner
from lynx_connector.bench.e2e.cells import Block
from lynx_connector.bench.e2e.report_file import ReportFile
from lynx_connector.bench.e2e.rows import to_report
from lynx_connector.bench.e2e.servers import Fleet
from lynx_connector.bench.errors import BenchError
from lynx_connector.testbed.link import loopback
from tests.unit.bench.e2e_rows import SAMPLE, row


def test_a_run_goes_on_where_its_report_ends(tmp_path):
    file = ReportFile(tmp_path / "e2e.json", "a machine", "a model")
    assert file.load() == []
    file.save(SAMPLE)
    assert file.load() == SAMPLE
    assert [one.name for one in tmp_path.iterdir()] == ["e2e.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "e2e.json: Expecting"),
        ("[]", "e2e.json: not a report"),
        (to_report("another", "a model", []), "its machine is 'another', here it is 'a machine'"),
        (to_report("a machine", "another", []), "its model is 'another', here it is 'a model'"),
        ({"machine": "a machine", "model": "a model"}, "e2e.json: no rows"),
        ({"machine": "a machine", "model": "a model", "rows": [{}]}, "e2e.json: row 0: keys"),
    ],
)
def test_what_cannot_be_resumed_is_refused(tmp_path, content, message):
    path = tmp_path / "e2e.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)
    with pytest.raises(BenchError, match=message):
        ReportFile(path, "a machine", "a model").load()
    assert path.read_text() == text


def test_resuming_measures_what_is_missing(tmp_path, model_folder, monkeypatch):
    """Servers and measurements are played; which of them, and in which order, is the bench's."""
    block = Block([100.0, 200.0], [1025], ["cached"], [1], 1)
    modes = ["single", "lynx", "lynx-int8"]
    options = runner.Options(tmp_path, str(model_folder), "bfloat16", modes, block)
    shaped = dataclasses.replace(loopback(0), kind="netns")
    started, measured, saved = [], [], []

    class PlayedFleet(Fleet):
        def __init__(self, modes, link, options):
            started.append([mode.name for mode in modes])
            super().__init__(modes, link, options)

        def start(self, timeout, waiting):
            """No server is started."""

    class PlayedMeter(measure.Meter):
        def warm_up(self, mode, prompt):
            """Nothing to warm."""

        def measure(self, mode, cell, prompts):
            measured.append((cell.link_mbit, mode.name))
            return [row(mode.name, 1.0, **dataclasses.asdict(cell))]

    monkeypatch.setattr(runner, "Fleet", PlayedFleet)
    monkeypatch.setattr(runner, "Meter", PlayedMeter)
    monkeypatch.setattr(runner, "open_link", lambda mbit: contextlib.nullcontext(shaped))
    monkeypatch.setattr(runner, "set_rate", lambda link, mbit: None)
    bench = runner.Bench(options, lambda line: None, lambda *step: None)
    known = [row(mode, 1.0, prompt_tokens=1025, link_mbit=100.0) for mode in modes[:2]]
    bench.rows += [*known, row("single", 1.0, prompt_tokens=1025)]
    bench.run(lambda rows: saved.append(len(rows)))
    assert started == [["lynx", "lynx-int8"]], "no server of a mode that is complete"
    assert measured == [(100.0, "lynx-int8"), (200.0, "lynx"), (200.0, "lynx-int8")]
    assert saved == [4, 5, 6]
    bench.run(lambda rows: saved.append(len(rows)))
    assert len(started) == 1, "nothing was left"
