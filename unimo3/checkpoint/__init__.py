"""Checkpoints: every rank saves its part, all parts are committed together, and files are verified before a load.

save, commit   save.py      `Saver`: when, in the background or not, and what follows from a failure; `begin_save`: the
                            protocol of staging folder, agreement of all ranks, manifest and rename
verify         manifest.py  the list of files with sizes and SHA-256
load           load.py      chooses the newest good checkpoint and loads it; elastic.py for other world sizes
list, remove   store.py     a run's checkpoints by name
export         export.py    weights as safetensors; zero.py reads a checkpoint's tensors without DeepSpeed

engine_files.py has DeepSpeed write its files, or copies them. state.py has what DeepSpeed does not save.
"""
