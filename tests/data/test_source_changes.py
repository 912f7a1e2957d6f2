"""What differs between the data sources of two stages is described source by source."""

from unimo3.data.source_changes import source_changes


def source(name, weight=1.0, fingerprint="", samples=10):
    fingerprint = fingerprint or name * 20
    return {"dataset": name, "split": "train", "samples": samples, "weight": weight, "fingerprint": fingerprint}


def test_equal_sources_and_equal_fractions_are_no_change():
    before = [source("a"), source("b", 3.0)]
    assert source_changes(before, before) == []
    assert source_changes(before, [source("b", 1.5), source("a", 0.5)]) == []
    assert source_changes([], []) == []


def test_each_kind_of_change_is_named():
    before = [source("a"), source("b")]
    assert source_changes(before, [source("a"), source("b"), source("c", 2.0)]) == [
        "a/train is 0.25 of the stream, previously 0.5",
        "b/train is 0.25 of the stream, previously 0.5",
        "c/train added (0.5 of the stream, index cccccccccccc of 10 samples)",
    ]
    assert source_changes(before, [source("b")]) == ["b/train is 1 of the stream, previously 0.5", "a/train removed"]
    assert source_changes(before, [source("a", 3.0), source("b")]) == [
        "a/train is 0.75 of the stream, previously 0.5",
        "b/train is 0.25 of the stream, previously 0.5",
    ]
    assert source_changes(before, [source("a", fingerprint="f" * 64, samples=11), source("b")]) == [
        "a/train has index ffffffffffff of 11 samples, previously aaaaaaaaaaaa of 10 samples"
    ]
    assert source_changes(before, [source("a"), source("z", fingerprint="b" * 20)]) == ["z/train was named b/train"]
