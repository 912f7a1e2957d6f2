"""Limits of a host: each is one line that names it and what to do."""

import resource
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.spawn import ROOT
from unimo3 import limits
from unimo3.data.args import DataArgs
from unimo3.errors import EXIT_CONFIG, ConfigError

SMALL = """
mount -t tmpfs -o size=16m tmpfs /dev/shm || exit 77
exec "$@"
"""
ASKS = "from unimo3.limits import shared_memory_errors as errors; print(errors(10**7), errors(10**9))"


@pytest.mark.integration
def test_shared_memory_that_is_too_small_is_named():
    command = ["unshare", "--mount", "bash", "-c", SMALL, "bash", sys.executable, "-c", ASKS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode in (1, 77):
        pytest.skip(f"needs the right to mount: {done.stderr}")
    expected = (
        "/dev/shm: 17 MB are free, readers and ranks need up to 1000 MB; enlarge it (a container's --shm-size), or "
    )
    assert done.stdout == f'[] ["{expected}lower data.num_workers or data.prefetch"]\n', done.stderr


def test_readers_of_training_and_evaluation_of_all_ranks_share_the_memory(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(limits.os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096))
    data = DataArgs(train="shards", val="others", num_workers=4, prefetch=3)
    num_bytes = 8 * (2 * 4 * 3) * (64 * 2 * 3 * 224 * 224)
    with pytest.raises(ConfigError, match=f"up to {num_bytes / 1e6:.0f} MB; enlarge it"):
        data.check_limits(micro_batch=64, image_size=224, num_images=2)
    replace(data, num_workers=0).check_limits(micro_batch=64, image_size=224, num_images=2)


@pytest.fixture
def limit(monkeypatch):
    """Sets one limit as a shell's ulimit does; the others have none."""

    def set_to(number, value):
        by_number = {number: value}
        monkeypatch.setattr(limits.resource, "getrlimit", lambda one: (by_number.get(one, resource.RLIM_INFINITY), 0))

    return set_to


def test_each_limit_of_a_shell_is_named_if_it_is_too_low(limit, monkeypatch):
    monkeypatch.setattr(limits.os, "geteuid", lambda: 12345)  # another user, who has no process yet
    for number, ulimit in ((resource.RLIMIT_NOFILE, "-n"), (resource.RLIMIT_NPROC, "-u")):
        limit(number, 99)
        assert limits.process_limit_errors(99, 99, has_gpu=True) == []
        (error,) = limits.process_limit_errors(100, 100, has_gpu=True)
        assert error.startswith(f"ulimit {ulimit}: 99 ")
        assert "up to 100 are needed; raise it (Slurm passes on that of the shell that submits)" in error
    monkeypatch.setattr(limits.os, "geteuid", lambda: 0)
    assert limits.process_limit_errors(100, 100, has_gpu=True) == []  # the kernel lets root start more
    limit(resource.RLIMIT_AS, 2**40)
    assert limits.process_limit_errors(1, 1, has_gpu=False) == []
    assert limits.process_limit_errors(1, 1, has_gpu=True)[0].startswith("ulimit -v: 1073741824 kB")
    limit(resource.RLIMIT_AS, 2**30)
    assert limits.process_limit_errors(1, 1, has_gpu=False)[0].startswith("ulimit -v: 1048576 kB")


def test_processes_that_read_from_an_object_store_count_its_threads(limit, monkeypatch):
    monkeypatch.setattr(limits.os, "geteuid", lambda: 12345)
    limit(resource.RLIMIT_NPROC, 20 + 3 * 4)
    data = DataArgs(train="shards", num_workers=4)
    data.check_limits(micro_batch=1, image_size=32, num_images=1)
    needed = 20 + 3 * 4 + 3 * (1 + 4)
    with pytest.raises(ConfigError, match=f"ulimit -u: 32 processes .*up to {needed} are needed"):
        replace(data, train="s3://bucket/shards").check_limits(micro_batch=1, image_size=32, num_images=1)


def test_a_users_own_processes_count():
    assert limits._num_threads_of_user() >= threading.active_count()


def test_infiniband_needs_locked_memory(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ADAPTERS", tmp_path)
    limit(resource.RLIMIT_MEMLOCK, 8 * 2**20)
    assert limits.locked_memory_errors() == []  # without adapters
    (tmp_path / "mlx5_0").mkdir()
    (error,) = limits.locked_memory_errors()
    assert error.startswith("ulimit -l: 8192 kB of locked memory, InfiniBand needs it unlimited; set LimitMEMLOCK")
    limit(resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY)
    assert limits.locked_memory_errors() == []


@pytest.mark.integration
@pytest.mark.parametrize("megabytes", [300, 500])
def test_too_few_addresses_for_the_imports_are_one_error(megabytes):
    command = ["bash", "-c", f'ulimit -v {megabytes}000; exec "$0" "$@"', sys.executable, "-m", "finetune.predict"]
    arguments = ["vqa", "--weights", "none", "--image", "a.jpg", "--text", "a"]
    ended = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == EXIT_CONFIG
    assert "Traceback" not in ended.stderr
    assert f"ulimit -v: {megabytes}000 kB of addresses are too few" in ended.stderr
