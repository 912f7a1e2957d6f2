"""Shared by all tests: the environment a machine without a GPU needs, set before anything is imported."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run in several processes already; and no thread may run in the server that ranks are forked from.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Read where a kernel is defined, so before any test imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import unimo3  # noqa: F401  (before transformers: it makes torchvision importable)
