from slurm import history
from unimo3.json_lines import append_record


def test_an_end_without_its_start_is_not_assigned_to_another_start(tmp_path):
    history.append(tmp_path, "begin", job="1", restart=0, nodes="n1", checkpoint=None)
    path = tmp_path / history.FOLDER / history.FILE
    path.write_text(path.read_text() + '{"event": "begin", "time": 1.0, "job": "2", "re')  # a kill
    history.append(tmp_path, "end", job="2", status=75, action="requeue", reason="why", checkpoint=4)
    history.append(tmp_path, "begin", job="2", restart=1, nodes="n2", checkpoint=4)
    first, second, third = history.read(tmp_path)
    assert (first.job, first.action) == ("1", None)
    assert (second.job, second.status, second.action, second.reason) == ("2", 75, "requeue", "why")
    assert (third.job, third.restart, third.action) == ("2", 1, None)


def test_a_record_that_lacks_a_field_is_skipped(tmp_path):
    path = tmp_path / "slurm" / "history.jsonl"
    path.parent.mkdir()
    for record in ({}, {"event": "begin", "time": 1}, {"event": "end", "time": 1}, {"event": "exclude", "time": 1}):
        append_record(path, record)
    history.append(tmp_path, "begin", job="7", restart=0, nodes="n1", checkpoint=None)
    assert [attempt.job for attempt in history.read(tmp_path)] == ["7"]
    assert history.excluded(tmp_path, "7") == []
