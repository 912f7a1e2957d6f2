"""What a new run starts from: an exported folder, or a run or one of its checkpoints, which is exported first.

Each may be in an object store: it is copied into the new run's folder.

A run that has checkpoints needs none of this any more.

Source: none.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from unimo3.checkpoint import store
from unimo3.checkpoint.load import newest_good
from unimo3.checkpoint.remote_init import fetch_exported, fetch_run, look_at, newest_tag
from unimo3.distributed import from_first_rank, on_all_ranks, world
from unimo3.errors import CheckpointError, ConfigError
from unimo3.object_store import is_store

if TYPE_CHECKING:
    from unimo3.model.config import Unimo3Config

log = logging.getLogger(__name__)

_MAX_FILE_BYTES = 2 * 10**9
# Names the source of the exported weights, `init` and the checkpoint's tag; written last.
_SOURCE = "source.txt"
# In place of the tag, of an exported folder in an object store.
_NO_TAG = "exported"


def has_begun(new_run: Path) -> bool:
    """Whether a run resumes from its own checkpoints, good or not, and no longer from what ``init`` names."""
    return store.has_folders(new_run) and (new_run / "model" / "config.json").is_file()


def run_of(init: str) -> Path | None:
    """The run that `init` names, itself or by one of its checkpoints; None of an exported folder."""
    folder = Path(init)
    if init and store.folder_of(folder).is_dir():
        return folder
    return folder.parent.parent if init and (folder / store.STATE).is_file() else None


def model_files_of(init: str, new_run: Path) -> str:
    """Folder with the configuration and the tokenizer of the weights that the run starts from or continues with."""
    if has_begun(new_run):
        return str(new_run / "model")
    run = run_of(init)
    if _exported_tag(init, new_run):
        return str(new_run / "init")
    if is_store(init):
        return look_at(init).files
    return init if run is None else str(run / "model")


def lacks_weights(init: str, new_run: Path) -> bool:
    """Whether the folder of `model_files_of` has no weights: they are in checkpoints, or still in an object store."""
    folder = model_files_of(init, new_run)
    if is_store(init):
        return has_begun(new_run) or folder != str(new_run / "init")
    return has_begun(new_run) or (run_of(init) is not None and Path(folder).name == "model")


def tokenizer_of(init: str, new_run: Path) -> str:
    """What to name as ``data.tokenizer``: the folder of `model_files_of`, or its URL where that is a temporary copy."""
    if is_store(init) and lacks_weights(init, new_run) and not has_begun(new_run):
        source = look_at(init)
        return f"{source.url}/model" if source.is_run else source.url
    return model_files_of(init, new_run)


def config_errors(folder: str) -> list[str]:
    """Return an error if a folder, of `model_files_of`, has no configuration."""
    if not folder:
        return ["init: '': names no weights; name an exported folder, or a run or one of its checkpoints"]
    if not (Path(folder) / "config.json").is_file():
        return [f"init: '{folder}': no config.json there; name a folder that python -m pretrain.export wrote"]
    return []


def config_of(init: str, new_run: Path) -> Unimo3Config:
    """The configuration of the weights that the run starts from or continues with.

    Raises:
        ConfigError: there is none, or it is another model's.
    """
    folder = model_files_of(init, new_run)
    if errors := config_errors(folder):
        raise ConfigError(errors)
    from unimo3.model.pretrained import read_exported_config

    return read_exported_config(folder, has_weights=not lacks_weights(init, new_run))


def exports(init: str, new_run: Path) -> bool:
    """Whether a start writes an export of `init` into the run's folder first; see `weights_of`."""
    has_source = is_store(init) or run_of(init) is not None
    return not has_begun(new_run) and has_source and not _exported_tag(init, new_run)


def weights_of(init: str, new_run: Path, newest: bool = False, field: str = "init") -> str:
    """Folder of exported weights, float32 if they have to be exported here; every rank calls it.

    Args:
        new_run: of the new run; a checkpoint is exported into ``new_run/init``, and a later start with the same `init`
            uses this export, whether its source still exists or not.
        newest: of an `init` that is a run, whether to export again if it has a newer checkpoint by now.
        field: setting that is `init`, for messages.

    Raises:
        CheckpointError: on every rank; there is no good checkpoint, or it cannot be exported.
    """
    rank, size = world()
    out, run = new_run / "init", run_of(init)
    exported = from_first_rank(f"looking for {out}", lambda: _exported_tag(init, new_run), "check the run's folder")
    if is_store(init):
        return _remote_weights(init, new_run, exported, newest)
    if exported and not (newest and run == Path(init)):
        return str(out)
    if run is None:
        return init
    if run == Path(init):
        checkpoint = newest_good(run)
        if checkpoint is None:
            raise CheckpointError(f"{field}: '{init}': has no good checkpoint; let it train to its first save")
        if exported == checkpoint.name:
            return str(out)
    else:
        checkpoint = Path(init)
        by_rank = on_all_ranks(
            f"verifying {checkpoint}", lambda: store.verify(checkpoint, rank, size), "name another one"
        )
        if problems := [problem for part in by_rank for problem in part]:
            condition = f"is damaged ({'; '.join(problems)})" if checkpoint.exists() else "was removed meanwhile"
            raise CheckpointError(f"{field}: '{init}': {condition}; name another checkpoint")

    def export() -> None:
        if rank == 0:
            from unimo3.checkpoint.export import export_run

            shutil.rmtree(out, ignore_errors=True)  # of another source
            export_run(run, checkpoint, out, "fp32", "error", _MAX_FILE_BYTES)
            (out / _SOURCE).write_text(f"{_name_of(init)}\n{checkpoint.name}")
            log.info("%s: %s exported to %s", field, checkpoint, out)

    on_all_ranks(f"exporting {checkpoint}", export, "name an exported folder or another checkpoint")
    return str(out)


def _remote_weights(init: str, new_run: Path, exported: str, newest: bool) -> str:
    """`weights_of` an `init` in an object store, which rank 0 copies into the run's folder; every rank calls it.

    Args:
        exported: tag of the checkpoint that was copied before.
    """
    out, copy = new_run / "init", new_run / "init.source"

    def fetch() -> None:
        if world()[0] != 0:
            return
        if exported:
            shutil.rmtree(copy, ignore_errors=True)  # of a start that was killed
        if exported and not newest:
            return
        source = look_at(init)
        if exported and exported == (newest_tag(source) or _NO_TAG):
            return
        if not source.is_run:
            fetch_exported(source.url, out)
            (out / _SOURCE).write_text(f"{_name_of(init)}\n{_NO_TAG}")
            return
        from unimo3.checkpoint.export import export_run

        checkpoint = fetch_run(source, copy)
        shutil.rmtree(out, ignore_errors=True)  # of another source
        export_run(copy, checkpoint, out, "fp32", "error", _MAX_FILE_BYTES)
        (out / _SOURCE).write_text(f"{_name_of(init)}\n{checkpoint.name}")
        shutil.rmtree(copy)
        log.info("init: %s of %s exported to %s", checkpoint.name, init, out)

    on_all_ranks(f"copying {init}", fetch, "name an exported folder or another checkpoint")
    return str(out)


def _exported_tag(init: str, new_run: Path) -> str:
    """Tag of the checkpoint of `init` that was exported to ``new_run/init``; empty: none was."""
    path = new_run / "init" / _SOURCE
    source, _, tag = path.read_text().partition("\n") if init and path.is_file() else ("", "", "")
    return tag if source == _name_of(init) else ""


def _name_of(init: str) -> str:
    return init.rstrip("/") if is_store(init) else str(Path(init).resolve())
