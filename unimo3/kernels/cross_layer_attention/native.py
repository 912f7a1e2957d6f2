"""The C++ kernel for float32 on CPUs: building it, and its place in autograd.

The library is compiled once, in one to three seconds, into ``$XDG_CACHE_HOME/unimo3`` (by default ``~/.cache/unimo3``).
Its name holds a hash of source, compiler and processor, so nodes of several kinds can share a home.

Source: native.cpp beside this file; the interface is C's, so that no header of torch has to be compiled.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
# A head is a whole number of the widest vectors.
WIDTH_MULTIPLE = 16


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("batch", "heads", "queries", "longest", "width", "levels", "threads")
    ]
    _fields_ += [("seed", ctypes.c_uint64), ("dropout", ctypes.c_float)]


class _View(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]


class _Level(ctypes.Structure):
    _fields_ = [("k", _View), ("v", _View), *((name, ctypes.c_void_p) for name in ("readable", "grad_k", "grad_v"))]
    _fields_ += [("keys", ctypes.c_int64)]


class _Tensors(ctypes.Structure):
    _fields_ = [(name, _View) for name in ("q", "out", "grad_out", "grad_q")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("gate", "grad_gate", "lse")]
    _fields_ += [("levels", ctypes.POINTER(_Level))]


def serves(q: Tensor) -> bool:
    """Whether the kernel can take these queries: float32 on a CPU, a head width it knows, and a compiler at hand."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape[-1] % WIDTH_MULTIPLE == 0
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def attend(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    gate: Tensor | None,
    masks: Sequence[Tensor] | None,
    dropout_p: float,
) -> Tensor:
    """What the reference computes, of tensors that the kernel `serves`."""
    gate = None if gate is None else gate.to(q.dtype)
    attended: Tensor = _Attention.apply(q, gate, masks, dropout_p, *k, *v)
    return attended


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with a warning, where it cannot be built."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    if compiler is None:
        log.warning("no C++ compiler: cross-layer attention on the CPU is slow without one; install g++ or set CXX")
        return None
    try:
        return ctypes.CDLL(str(_built(shlex.split(compiler))))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("cross-layer attention on the CPU is slow: its kernel was not built with %s: %s", compiler, reason)
        return None


def _built(compiler: list[str]) -> Path:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (SOURCE.read_text(), " ".join([*compiler, *FLAGS]), version, _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unimo3"
    target = folder / f"cross_layer_attention-{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Ranks may build at once: each into a folder of its own, and the last rename wins with the same content.
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            built = Path(staging) / target.name
            command = [*compiler, *FLAGS, "-o", str(built), str(SOURCE)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            built.replace(target)
    return target


def _processor() -> str:
    """What decides the instructions that ``-march=native`` stands for."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join(sorted(kept)) or os.uname().machine


def _view(tensor: Tensor) -> _View:
    return _View(tensor.data_ptr(), *tensor.stride()[:3])


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _like_projection(q: Tensor) -> Tensor:
    """An empty [B, H, T, d] that lies in memory as [B, T, H d], as linear maps give and take it."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        gate: Tensor | None,
        masks: Sequence[Tensor] | None,
        dropout_p: float,
        *levels: Tensor,
    ):
        """Attend, and keep one log-sum-exp a query and level for the backward pass."""
        q, levels = _dense_rows(q), tuple(map(_dense_rows, levels))
        gate = None if gate is None else gate.contiguous()
        masks = () if masks is None else tuple(mask.contiguous() for mask in masks)
        num_levels = len(levels) // 2
        batch, heads, tokens, width = q.shape
        # torch's own generator, so that activation checkpointing and a resumed run draw the same again.
        seed = int(torch.randint(2**63 - 1, ())) if dropout_p > 0 else 0
        longest = max(level.shape[2] for level in levels)
        threads = torch.get_num_threads()
        ctx.shape = _Shape(batch, heads, tokens, longest, width, num_levels, threads, seed, dropout_p)
        out = _like_projection(q)
        lse = q.new_empty(batch, heads, num_levels, tokens)
        _call("forward", ctx.shape, _tensors(q, gate, masks, lse, levels, out=_view(out)))
        ctx.save_for_backward(q, gate, lse, *levels, *masks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor):
        """Gradients of all inputs, from P made anew."""
        q, gate, lse, *rest = ctx.saved_tensors
        num_levels = ctx.shape.levels
        levels, masks = rest[: 2 * num_levels], rest[2 * num_levels :]
        grad_out = _dense_rows(grad_out)
        grad_q = _like_projection(q)
        grad_gate = None if gate is None else torch.zeros_like(gate)
        # Without queries no key is visited.
        empty = torch.empty_like if q.numel() else torch.zeros_like
        grads = [empty(level, memory_format=torch.contiguous_format) for level in levels]
        tensors = _tensors(q, gate, masks, lse, levels, grad_out=_view(grad_out), grad_q=_view(grad_q))
        tensors.grad_gate = None if grad_gate is None else grad_gate.data_ptr()
        for place in range(num_levels):
            tensors.levels[place].grad_k = grads[place].data_ptr()
            tensors.levels[place].grad_v = grads[num_levels + place].data_ptr()
        _call("backward", ctx.shape, tensors)
        return grad_q, grad_gate, None, None, *grads


def _tensors(
    q: Tensor, gate: Tensor | None, masks: Sequence[Tensor], lse: Tensor, levels: Sequence[Tensor], **views: _View
) -> _Tensors:
    num_levels = len(levels) // 2
    entries = (_Level * num_levels)()
    for place, entry in enumerate(entries):
        key, value = levels[place], levels[num_levels + place]
        entry.k, entry.v, entry.keys = _view(key), _view(value), key.shape[2]
        entry.readable = masks[place].data_ptr() if masks else None
    return _Tensors(
        q=_view(q), gate=None if gate is None else gate.data_ptr(), lse=lse.data_ptr(), levels=entries, **views
    )


def _call(name: str, shape: _Shape, tensors: _Tensors) -> None:
    kernels = library()
    assert kernels is not None
    getattr(kernels, f"cross_layer_attention_{name}")(ctypes.byref(shape), ctypes.byref(tensors))
