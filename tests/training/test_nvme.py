"""The folder on NVMe: one a run, and refused before training where it cannot be used."""

import pytest

from unimo3.errors import ConfigError
from unimo3.training.nvme import prepare_swap_folder, swap_folder


def config(folder):
    return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(folder)}}}


def test_each_run_has_a_folder_of_its_own(tmp_path):
    one, other = (swap_folder(str(tmp_path), tmp_path / user / "base") for user in ("a", "b"))
    assert one != other == swap_folder(str(tmp_path), tmp_path / "a" / ".." / "b" / "base")
    assert one.startswith(f"{tmp_path}/base-")
    assert swap_folder("", tmp_path / "base") == ""


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone': no folder can be made there on \S+ \(No such file"):
        prepare_swap_folder(config(tmp_path / "gone" / "base"))
    prepare_swap_folder({"zero_optimization": {"stage": 3}})


@pytest.mark.integration
def test_a_machine_without_libaio_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LDFLAGS", "-nodefaultlibs")  # as without the library
    monkeypatch.setenv("CC", "false")
    with pytest.raises(ConfigError, match="async_io, which reads and writes NVMe, cannot be built"):
        prepare_swap_folder(config(tmp_path / "base"))
