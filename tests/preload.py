"""All that a rank of a test imports, imported once by the server that ranks are forked from.

Also what torch, deepspeed and transformers import only when it is used: a forked rank would import it again each time.
"""
# ruff: noqa: F401

import gc
from pathlib import Path

import unimo3  # first: it keeps libraries from importing what is not needed

# isort: split
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import pytest
import s3fs
import torch._dynamo
import torch.distributed.elastic
import torch.utils.cpp_extension
import torch.utils.tensorboard

import finetune.choose
import finetune.nlvr2
import finetune.predict_program
import finetune.program
import finetune.retrieval
import finetune.snli_ve
import finetune.vqa
import pretrain.program
import pretrain.train
import tests.interpreter
import unimo3.model.downstream
from unimo3.startup import resume_collections
from unimo3.training.engine import import_muon_uncompiled

import_muon_uncompiled()

# A fork copies only the thread that forks: locks that other threads hold would stay locked in it.
_threads = [path.name for path in Path("/proc/self/task").iterdir()]
assert len(_threads) == 1, f"the server that ranks are forked from has {len(_threads)} threads"
# Collections of garbage would write to all objects, and so copy the server's memory into every rank.
gc.collect()
resume_collections()
