"""What a new run starts from: an exported folder, or a run or one of its checkpoints, which is exported first.

Source: none.
"""

import shutil
from pathlib import Path

from unimo3.checkpoint import store
from unimo3.checkpoint.agree import together
from unimo3.checkpoint.export import export_run
from unimo3.distributed import world
from unimo3.errors import CheckpointError
from unimo3.model.config import Unimo3Config
from unimo3.model.pretrained import read_exported_config

_MAX_FILE_BYTES = 2 * 10**9
# Says what the exported weights were made of; written last.
_SOURCE = "source.txt"


def run_of(init: str) -> Path | None:
    """The run that `init` names, itself or by one of its checkpoints; None of an exported folder."""
    folder = Path(init)
    if init and store.folder_of(folder).is_dir():
        return folder
    return folder.parent.parent if init and (folder / store.STATE).is_file() else None


def model_files_of(init: str, own_run: Path) -> str:
    """Folder with the configuration and the tokenizer that belong to `init`'s weights; see `weights_of`."""
    run = run_of(init)
    if _is_kept(init, own_run):
        return str(own_run / "init")
    return init if run is None else str(run / "model")


def config_of(init: str, own_run: Path) -> Unimo3Config:
    """The configuration that belongs to `init`'s weights.

    Raises:
        ConfigError: there is none, or it is another model's.
    """
    folder = model_files_of(init, own_run)
    return read_exported_config(folder, has_weights=Path(folder).name != "model" or run_of(init) is None)


def weights_of(init: str, own_run: Path) -> str:
    """Folder of exported weights, float32 if they have to be exported here; every rank calls it.

    Args:
        own_run: of the new run; a checkpoint is exported into ``own_run/init``, and a later start with the same `init`
            takes what is there, whether its source still is or not.

    Raises:
        CheckpointError: on every rank; there is no good checkpoint, or it cannot be exported.
    """
    rank, size = world()
    out, run = own_run / "init", run_of(init)
    if together(f"looking for {out}", lambda: _is_kept(init, own_run), "check the run's folder")[0]:
        return str(out)
    if run is None:
        return init
    if run == Path(init):
        checkpoint = store.newest_good(run)
        if checkpoint is None:
            raise CheckpointError(f"init: '{init}': has no good checkpoint; let it train to its first save")
    else:
        checkpoint = Path(init)
        shares = together(f"verifying {checkpoint}", lambda: store.verify(checkpoint, rank, size), "name another one")
        if problems := [problem for share in shares for problem in share]:
            raise CheckpointError(f"init: '{init}': is damaged ({'; '.join(problems)}); name another checkpoint")

    def export() -> None:
        if rank == 0:
            shutil.rmtree(out, ignore_errors=True)  # of another source
            export_run(run, checkpoint, out, "fp32", "error", _MAX_FILE_BYTES)
            (out / _SOURCE).write_text(_name_of(init))

    together(f"exporting {checkpoint}", export, "name an exported folder or another checkpoint")
    return str(out)


def _is_kept(init: str, own_run: Path) -> bool:
    path = own_run / "init" / _SOURCE
    return bool(init) and path.is_file() and path.read_text() == _name_of(init)


def _name_of(init: str) -> str:
    return str(Path(init).resolve())
