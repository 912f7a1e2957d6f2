"""Checkpoints: every rank saves its part, all parts are committed together, and files are verified before a load.

save      saver.py     when, in the background or not, and what follows from a failure
          commit.py    the protocol: staging folder, agreement of all ranks, manifest, rename
verify    manifest.py  the list of files with sizes and SHA-256
load      store.py     choose the newest good checkpoint, load it, remove old ones; elastic.py for other world sizes
export    export.py    weights as safetensors; zero.py reads a checkpoint's tensors without DeepSpeed
"""
