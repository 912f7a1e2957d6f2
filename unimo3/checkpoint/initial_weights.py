"""What a new run starts from: an exported folder, or a run or one of its checkpoints, which is exported first.

A run that has checkpoints needs none of this any more.

Source: none.
"""

import logging
import shutil
from pathlib import Path

from unimo3.checkpoint import store
from unimo3.checkpoint.export import export_run
from unimo3.checkpoint.load import newest_good
from unimo3.distributed import on_all_ranks, world
from unimo3.errors import CheckpointError
from unimo3.model.config import Unimo3Config
from unimo3.model.pretrained import read_exported_config

log = logging.getLogger(__name__)

_MAX_FILE_BYTES = 2 * 10**9
# Names the source of the exported weights, `init` and the checkpoint's tag; written last.
_SOURCE = "source.txt"


def has_begun(own_run: Path) -> bool:
    """Whether a run resumes from its own checkpoints, good or not, and no longer from what ``init`` names."""
    return store.has_folders(own_run) and (own_run / "model" / "config.json").is_file()


def run_of(init: str) -> Path | None:
    """The run that `init` names, itself or by one of its checkpoints; None of an exported folder."""
    folder = Path(init)
    if init and store.folder_of(folder).is_dir():
        return folder
    return folder.parent.parent if init and (folder / store.STATE).is_file() else None


def model_files_of(init: str, own_run: Path) -> str:
    """Folder with the configuration and the tokenizer of the weights that the run starts from or continues with."""
    if has_begun(own_run):
        return str(own_run / "model")
    run = run_of(init)
    if _exported_tag(init, own_run):
        return str(own_run / "init")
    return init if run is None else str(run / "model")


def config_of(init: str, own_run: Path) -> Unimo3Config:
    """The configuration of the weights that the run starts from or continues with.

    Raises:
        ConfigError: there is none, or it is another model's.
    """
    folder = model_files_of(init, own_run)
    has_none = has_begun(own_run) or (run_of(init) is not None and Path(folder).name == "model")
    return read_exported_config(folder, has_weights=not has_none)


def exports(init: str, own_run: Path) -> bool:
    """Whether a start writes an export of `init` into the run's folder first; see `weights_of`."""
    return not has_begun(own_run) and run_of(init) is not None and not _exported_tag(init, own_run)


def weights_of(init: str, own_run: Path, newest: bool = False) -> str:
    """Folder of exported weights, float32 if they have to be exported here; every rank calls it.

    Args:
        own_run: of the new run; a checkpoint is exported into ``own_run/init``, and a later start with the same `init`
            uses this export, whether its source still exists or not.
        newest: of an `init` that is a run, whether to export again if it has a newer checkpoint by now.

    Raises:
        CheckpointError: on every rank; there is no good checkpoint, or it cannot be exported.
    """
    rank, size = world()
    out, run = own_run / "init", run_of(init)
    exported = on_all_ranks(f"looking for {out}", lambda: _exported_tag(init, own_run), "check the run's folder")[0]
    if exported and not (newest and run == Path(init)):
        return str(out)
    if run is None:
        return init
    if run == Path(init):
        checkpoint = newest_good(run)
        if checkpoint is None:
            raise CheckpointError(f"init: '{init}': has no good checkpoint; let it train to its first save")
        if exported == checkpoint.name:
            return str(out)
    else:
        checkpoint = Path(init)
        by_rank = on_all_ranks(
            f"verifying {checkpoint}", lambda: store.verify(checkpoint, rank, size), "name another one"
        )
        if problems := [problem for part in by_rank for problem in part]:
            raise CheckpointError(f"init: '{init}': is damaged ({'; '.join(problems)}); name another checkpoint")

    def export() -> None:
        if rank == 0:
            shutil.rmtree(out, ignore_errors=True)  # of another source
            export_run(run, checkpoint, out, "fp32", "error", _MAX_FILE_BYTES)
            (out / _SOURCE).write_text(f"{_name_of(init)}\n{checkpoint.name}")
            log.info("init: %s exported to %s", checkpoint, out)

    on_all_ranks(f"exporting {checkpoint}", export, "name an exported folder or another checkpoint")
    return str(out)


def _exported_tag(init: str, own_run: Path) -> str:
    """Tag of the checkpoint of `init` that was exported to ``own_run/init``; empty: none was."""
    path = own_run / "init" / _SOURCE
    source, _, tag = path.read_text().partition("\n") if init and path.is_file() else ("", "", "")
    return tag if source == _name_of(init) else ""


def _name_of(init: str) -> str:
    return str(Path(init).resolve())
