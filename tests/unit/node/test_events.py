"""The event log: known names, whole lines, and a full disk that stops nobody."""

from __future__ import annotations

import pytest

from p2pflock.node.events import EventLog, read_events


class Clock:
    def monotonic_seconds(self):
        return 1.0

    def unix_seconds(self):
        return 1_800_000_000


def test_events_are_read_as_they_were_written(tmp_path):
    path, heard = tmp_path / "events.jsonl", []
    log = EventLog(path, Clock(), heard.append)
    log.emit("decided", round=1, model_hash="ab", absent=[[2, 0]])
    log.emit("finished", round=1)
    log.close()
    assert list(read_events(path)) == heard
    assert heard[0] == {"time": 1_800_000_000, "event": "decided", "round": 1, "model_hash": "ab", "absent": [[2, 0]]}


def test_a_restart_appends(tmp_path):
    for round_ in (1, 2):
        log = EventLog(tmp_path / "e", Clock())
        log.emit("decided", round=round_)
        log.close()
    assert [event["round"] for event in read_events(tmp_path / "e")] == [1, 2]


def test_a_torn_last_line_is_left_for_the_next_read(tmp_path):
    path = tmp_path / "e"
    path.write_text('{"event":"started"}\n{"event":"dec')
    assert [event["event"] for event in read_events(path)] == ["started"]


def test_no_file_means_no_events(tmp_path):
    assert list(read_events(tmp_path / "none")) == []


def test_an_unknown_event_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="surprise"):
        EventLog(None, Clock()).emit("surprise")


def test_a_full_disk_is_counted_and_the_listener_still_hears():
    heard = []
    log = EventLog(None, Clock(), heard.append)

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    log._file = Full()
    log.emit("started")
    assert (log.lost, len(heard)) == (1, 1)
