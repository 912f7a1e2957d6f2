"""The end of a program: its status and message, whatever characters are in its names."""

import errno
import io
import os
import sys

import pytest

from unimo3.errors import EXIT_CONFIG, ConfigError, DataError, exit_with_status

NAMES = ["caf\udce9.jpg", "half \ud83d", "déjà 犬 🚲"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_printed_where_stdout_is_strict(monkeypatch, encoding, name):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding, errors="strict"))

    @exit_with_status
    def main():
        print(f"0.9000  {name}", flush=True)

    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    line = printed.getvalue().decode(encoding)
    assert line == f"0.9000  {name.encode(encoding, 'backslashreplace').decode(encoding)}\n"


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_the_reason_that_a_job_script_reads(monkeypatch, tmp_path, name, capfd):
    monkeypatch.setenv("UNIMO3_STATUS_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")

    @exit_with_status
    def main():
        raise DataError(f"{name}: is missing")

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 78
    shown = name.encode("utf-8", "backslashreplace").decode()
    assert (tmp_path / "rank_3").read_text(encoding="utf-8") == f"78\nDataError: {shown}: is missing\n"
    assert capfd.readouterr().err.startswith("DataError: ")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_file_that_may_not_be_written_is_one_error_with_the_fix(number, capsys):
    @exit_with_status
    def main():
        raise OSError(number, os.strerror(number), "runs/a/metrics.jsonl")

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == EXIT_CONFIG
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert f"{os.strerror(number)}: 'runs/a/metrics.jsonl'; " in error


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:sec/ret@bucket/x", "s3://...bucket/x"),
        ("https:/key:secret@host/x", "https:/...host/x"),  # as a path has it
        ("https://host/x?signature=secret", "https://host/x..."),
        ("s3://secret@bucket/x#secret", "s3://...bucket/x..."),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("/mnt/a@b/what?", "/mnt/a@b/what?"),
    ],
)
def test_urls_in_errors_have_no_login_and_no_query(url, shown, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("UNIMO3_STATUS_DIR", str(tmp_path))

    def main():
        raise ConfigError([f"data.train: '{url}': is refused; name it ({url}); or another"])

    with pytest.raises(SystemExit):
        exit_with_status(main)()
    line = f"data.train: '{shown}': is refused; name it ({shown}); or another"
    assert line in capsys.readouterr().err
    assert line in (tmp_path / "rank_0").read_text()


@pytest.mark.parametrize("leftover", [{"LOCAL_RANK": "1"}, {"RANK": "3", "WORLD_SIZE": "1", "LOCAL_RANK": "2"}])
def test_a_process_alone_reports_its_errors_as_rank_0(monkeypatch, tmp_path, leftover, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("UNIMO3_STATUS_DIR", str(tmp_path))
    for name, value in leftover.items():
        monkeypatch.setenv(name, value)

    @exit_with_status
    def main():
        raise DataError("a.tar: is missing")

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == EXIT_CONFIG
    assert capsys.readouterr().err == "DataError: a.tar: is missing\n"
    assert (tmp_path / "rank_0").is_file()
