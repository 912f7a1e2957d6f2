"""What a new run starts from: an exported folder, or a run or one of its checkpoints, which is exported first.

Source: none.
"""

from pathlib import Path

from unimo3.checkpoint import store
from unimo3.checkpoint.agree import together
from unimo3.checkpoint.export import export_run
from unimo3.distributed import world
from unimo3.errors import CheckpointError
from unimo3.model.config import Unimo3Config
from unimo3.model.pretrained import read_exported_config

_MAX_FILE_BYTES = 2 * 10**9


def run_of(init: str) -> Path | None:
    """The run that `init` names, itself or by one of its checkpoints; None of an exported folder."""
    folder = Path(init)
    if init and store.folder_of(folder).is_dir():
        return folder
    return folder.parent.parent if init and (folder / store.STATE).is_file() else None


def model_files_of(init: str) -> str:
    """Folder with the configuration and the tokenizer that belong to `init`'s weights."""
    run = run_of(init)
    return init if run is None else str(run / "model")


def config_of(init: str) -> Unimo3Config:
    """The configuration that belongs to `init`'s weights.

    Raises:
        ConfigError: there is none, or it is another model's.
    """
    return read_exported_config(model_files_of(init), has_weights=run_of(init) is None)


def weights_of(init: str, own_run: Path) -> str:
    """Folder of exported weights, float32 if they have to be exported here; every rank calls it.

    Args:
        own_run: of the new run; a checkpoint is exported into ``own_run/init``, once.

    Raises:
        CheckpointError: on every rank; there is no good checkpoint, or it cannot be exported.
    """
    run = run_of(init)
    if run is None:
        return init
    rank, size = world()
    out = own_run / "init"
    if together(f"looking for {out}", out.is_dir, "check the run's folder")[0]:
        return str(out)
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
            export_run(run, checkpoint, out, "fp32", "error", _MAX_FILE_BYTES)

    together(f"exporting {checkpoint}", export, "name an exported folder or another checkpoint")
    return str(out)
