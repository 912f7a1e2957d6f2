"""The retrieval benchmark: a small run writes its report, all pairs agree with METER's way, hours follow from costs."""

import pytest

from experiments import retrieval, retrieval_cost


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        retrieval.main([str(word) for word in arguments])
    return end.value.code


@pytest.mark.integration
def test_a_small_run_writes_its_report(tmp_path, capsys):
    out = tmp_path / "retrieval.md"
    options = ("--images", 6, "--steps", 2, "--shortlists", 2, "--threads", 1, "--base-pairs", 0)
    assert not run(*options, "--out", out)
    report = out.read_text()
    rows = {
        cells[1]: cells[2:-1]
        for cells in ([cell.strip() for cell in line.split("|")] for line in report.splitlines())
        if len(cells) == 12
    }
    meter, exact = rows["METER's way, all pairs"], rows["cached states, all pairs (exact)"]
    assert meter[0] == exact[0] == "180"
    assert meter[3:] == exact[3:]
    assert int(rows["shortlist of 2"][0]) < 180
    assert "the same six metrics as METER's way" in report
    assert "6 images and 30 texts" in report
    assert str(tmp_path) not in report


def test_hours_are_those_of_towers_and_pairs():
    table = retrieval_cost.hours({"image": 3.6, "text": 0.36, "pair": 0.72}, shortlist=100)
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in table.splitlines()[2:]}
    costs = {way: [float(cell.replace(",", "")) for cell in cells] for way, cells in rows.items()}
    assert costs["METER's way, all pairs"] == [125_050_000, pytest.approx(125_050_000 * 4.68 / 3600)]
    towers = (5000 * 3.6 + 25010 * 0.36) / 3600
    assert costs["cached states, all pairs (exact)"][1] == pytest.approx(towers + 125_050_000 * 0.72 / 3600, abs=0.5)
    assert costs["shortlist of 100, 5K alone"] == [3_001_000, pytest.approx(towers + 600.2, abs=0.5)]
    assert costs["shortlist of 100, 5K and five folds"][0] == 6_002_000


def test_bad_arguments_are_named_together(capsys):
    assert run("--images", 1, "--shortlists", 0, "--width", 6) == 78
    printed = capsys.readouterr().err
    assert "--images 1: at least 4" in printed
    assert "--shortlists 0: at least 1" in printed
    assert "--width 6: a multiple of 4" in printed
