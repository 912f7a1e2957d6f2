"""Kills in the middle of a save: `begin` trains a run that is never killed, `trials` gives what became of each trial.

A trial resumes a copy of a run at step 2, trains to step 4 and saves. At the n-th file event of that save one rank
kills itself with SIGKILL, or the kernel ends it at the n-th byte of a file (SIGXFSZ, which torch's writer can answer no
more than SIGKILL); the other follows, as under a launcher. Then the run is started again and trained to 6.
"""

import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.ranks import start_engine, state_at, train
from tests.spawn import run_ranks, run_ranks_to_any_end
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.load import load, newest_good
from unimo3.checkpoint.save import Saver
from unimo3.distributed import world

# What changes files, or opens one.
_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
# Fractions of a rank's largest file after which a kill comes: within its header, its tensors and its directory.
_FRACTIONS = (0.02, 0.5, 0.98)


class FileEvents:
    """Counts this process's file events in a folder while it is on, and kills it at one of them."""

    def __init__(self, folder: Path):
        self._folder = str(folder)
        self.count = 0
        self.kill_at: int | None = None
        self.is_on = False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event in _EVENTS and str(arguments[0]).startswith(self._folder):
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def end_at_byte(number: int) -> None:
    """Have the kernel end this process when it writes beyond that many bytes of any file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def own_save(engine: Any, run: Path, step: int, background: bool) -> None:
    """Through this project's protocol."""
    saver = Saver(engine, run, CheckpointArgs(background=background))
    saver.save(state_at(step))
    if background:
        train(engine, range(step, step + 1))  # continues meanwhile; a run that is killed has lost it
    saver.wait()


def own_load(engine: Any, run: Path) -> int:
    """The newest good checkpoint; its step."""
    newest = newest_good(run)
    return 0 if newest is None else load(engine, newest).step


def plain_save(engine: Any, run: Path, step: int, background: bool) -> None:
    """DeepSpeed's save."""
    engine.save_checkpoint(str(run), tag=f"step{step}", client_state={"step": step, "rng": torch.get_rng_state()})


def plain_load(engine: Any, run: Path) -> int:
    """What DeepSpeed's ``latest`` names."""
    path, client = engine.load_checkpoint(str(run))
    if path is None:
        return 0
    torch.set_rng_state(client["rng"])
    return int(client["step"])


PROTOCOLS = {"own": (own_save, own_load), "plain": (plain_save, plain_load)}


def begin(folder: Path, protocol: str) -> list[list[float]]:
    """Train a run to step 6 and save it at step 2 alone; each rank's losses."""
    return run_ranks(2, _begin, folder, protocol)


def trials(folder: Path, protocol: str, num_points: int) -> Iterator[dict[str, Any]]:
    """What became of each kill, half of them in saves behind the training."""
    kinds = [(background, victim) for background in (False, True) for victim in range(2)]
    kinds = kinds if protocol == "own" else kinds[1:2]
    for background, victim in kinds:
        run = folder / f"counted_{background}_{victim}"
        shutil.copytree(folder / "run", run)
        count = run_ranks(2, _save_and_die, run, protocol, background, victim, None, None)[victim]
        largest = max(path.stat().st_size for path in run.rglob(f"*zero_pp_rank_{victim}_*"))
        each = max(2, num_points // len(kinds) - len(_FRACTIONS) + (victim == 0))
        points = [(number * (count - 1) // (each - 1), None) for number in range(each)]
        for point, byte in points + [(None, int(fraction * largest)) for fraction in _FRACTIONS]:
            run = folder / f"{background}_{victim}_{point}_{byte}"
            shutil.copytree(folder / "run", run)
            killed = run_ranks_to_any_end(2, _save_and_die, run, protocol, background, victim, point, byte)
            trial = {
                "background": background,
                "victim": victim,
                "point": point,
                "of": count,
                "byte": byte,
                "killed": killed,
            }
            yield trial | {"resumed": run_ranks_to_any_end(2, _resume, run, protocol)}
            shutil.rmtree(run)


def _begin(folder: Path, protocol: str) -> list[float]:
    engine = start_engine(3, bf16=True)
    torch.manual_seed(7 + world()[0])
    losses = train(engine, range(2))
    PROTOCOLS[protocol][0](engine, folder / "run", 2, False)
    return losses + train(engine, range(2, 6))


def _save_and_die(run: Path, protocol: str, background: bool, victim: int, point: int | None, byte: int | None) -> int:
    """Train to step 4 and save, where `victim` is killed; the number of its file events if it is not."""
    save, load = PROTOCOLS[protocol]
    engine = start_engine(3, bf16=True, seed=99)
    assert load(engine, run) == 2
    train(engine, range(2, 4))
    is_victim = world()[0] == victim
    events = FileEvents(run)
    events.kill_at = point if is_victim else None
    events.is_on = True
    if is_victim and byte is not None:
        end_at_byte(byte)
    save(engine, run, 4, background)
    events.is_on = False
    return events.count


def _resume(run: Path, protocol: str) -> tuple[int, list[float]]:
    """Load what is there and train to step 6: the step begun with, and the losses since."""
    engine = start_engine(3, bf16=True, seed=98)
    step = PROTOCOLS[protocol][1](engine, run)
    return step, train(engine, range(step, 6))
