import logging
import subprocess
import sys

import pytest

from tests.spawn import ROOT
from unimo3.json_lines import append_record, read_records


def test_a_record_after_a_cut_off_line_is_not_lost(tmp_path, caplog):
    path = tmp_path / "records.jsonl"
    assert read_records(path) == []
    append_record(path, {"n": 1})
    path.write_text(path.read_text() + '{"n": 2, "te')  # a kill
    append_record(path, {"n": 3})
    append_record(path, {"n": 4})
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [{"n": 1}, {"n": 3}, {"n": 4}]
    assert f"{path}: 1 damaged lines are skipped, the first is line 2" in caplog.text


def test_lines_that_are_no_records_are_skipped(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'[1]\n\n7\n\xff\n{"n": 1}\n\0\0\0\n' + b"[" * 100_000 + b'\n{"n": 2}')
    assert read_records(path) == [{"n": 1}, {"n": 2}]


@pytest.mark.integration
def test_a_record_that_only_half_fits_is_an_error_and_none_is_cut_off(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(path, {"n": "x" * 900})
    before = path.read_bytes()
    code = "import resource, signal, sys; from pathlib import Path; from unimo3.json_lines import append_record\n"
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    code += "append_record(Path(sys.argv[1]), {'n': 'y' * 200})"
    ended = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "File too large" in ended.stderr
    assert path.read_bytes() == before
