"""The C++ kernel for float32 on CPUs, built and called.

The library is compiled once, in one to three seconds, into ``$XDG_CACHE_HOME/unimo3`` (by default ``~/.cache/unimo3``).
Its name contains a hash of source, compiler and processor, so nodes of several kinds can share a home.

Source: native.cpp next to this file; the interface is C's, so that no header of torch has to be compiled.
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
from pathlib import Path

import torch
from torch import Tensor

from unimo3.kernels.cross_layer_attention.dropout import num_words, threshold, words_by_query
from unimo3.kernels.cross_layer_attention.op import Grads, Inputs, Outputs, make_operator
from unimo3.project_files import package_folder

log = logging.getLogger(__name__)

SOURCE = package_folder("unimo3.kernels.cross_layer_attention") / "native.cpp"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
# A head's width is a multiple of the widest vector.
WIDTH_MULTIPLE = 16


class _Shape(ctypes.Structure):
    _sizes = ("batch", "heads", "queries", "longest", "words", "width", "levels", "threads")
    _fields_ = [(name, ctypes.c_int64) for name in _sizes]
    _fields_ += [("dropout", ctypes.c_float)]


class _Level(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("kv", "readable", "grad")]
    _fields_ += [("keys", ctypes.c_int64)]


class _Tensors(ctypes.Structure):
    _names = ("q", "out", "grad_out", "grad_q", "gate", "lse", "offsets", "bits")
    _fields_ = [(name, ctypes.c_void_p) for name in _names]
    _fields_ += [("levels", ctypes.POINTER(_Level))]


def supports(q: Tensor) -> bool:
    """Whether the kernel can take these queries: float32 on a CPU, a head width it knows, and a compiler available."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape[-1] % WIDTH_MULTIPLE == 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # vmap and its like need operations they know
        and library() is not None
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with a warning, where it cannot be built."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    if compiler is None:
        log.warning("no C++ compiler: cross-layer attention on the CPU is slow without one; install g++ or set CXX")
        return None
    try:
        return ctypes.CDLL(str(_built(shlex.split(compiler))))
    # No home folder is a RuntimeError, an unreadable CXX a ValueError.
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("cross-layer attention on the CPU is slow: its kernel was not built with %s: %s", compiler, reason)
        return None


def _built(compiler: list[str]) -> Path:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    parts = (SOURCE.read_bytes(), " ".join([*compiler, *FLAGS]).encode(), version, _processor().encode())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unimo3"
    target = folder / f"cross_layer_attention-{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Ranks may build at once: each into a separate folder, and the last rename wins with the same content.
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            built = Path(staging) / target.name
            command = [*compiler, *FLAGS, "-o", str(built), str(SOURCE)]
            subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
            # On the disk before it has its name: a file cut off by a crash would end every process that loads it.
            with built.open("rb") as file:
                os.fsync(file.fileno())
            built.replace(target)
    return target


def _processor() -> str:
    """What decides the instructions that ``-march=native`` stands for."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    relevant = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join(sorted(relevant)) or os.uname().machine


class _Call:
    """The kernel's arguments, and the tensors that they point into."""

    def __init__(self, inputs: Inputs, lse: Tensor):
        gate = None if inputs.gate is None else inputs.gate.float()
        self._alive = (inputs, gate)
        batch, queries, heads, width = inputs.q.shape
        sizes = (inputs.longest, num_words(inputs.longest), width, len(inputs.levels), torch.get_num_threads())
        self._shape = _Shape(batch, heads, queries, *sizes, inputs.dropout_p)
        self.levels = (_Level * len(inputs.levels))()
        for index, (entry, level) in enumerate(zip(self.levels, inputs.levels, strict=True)):
            entry.kv, entry.keys = level.data_ptr(), level.shape[1]
            if inputs.masks:
                entry.readable = inputs.masks[index if len(inputs.masks) > 1 else 0].data_ptr()
        self.tensors = _Tensors(
            q=inputs.q.data_ptr(),
            gate=None if gate is None else gate.data_ptr(),
            lse=lse.data_ptr(),
            bits=None if inputs.bits is None else inputs.bits.data_ptr(),
            levels=self.levels,
        )

    def run(self, name: str) -> None:
        """Run ``forward`` or ``backward``."""
        kernels = library()
        assert kernels is not None
        getattr(kernels, f"cross_layer_attention_{name}")(ctypes.byref(self._shape), ctypes.byref(self.tensors))


def _fill_outputs(inputs: Inputs, outputs: Outputs) -> None:
    call = _Call(inputs, outputs.lse)
    call.tensors.out = outputs.out.data_ptr()
    call.run("forward")


def _fill_grads(inputs: Inputs, grad_out: Tensor, lse: Tensor, grads: Grads) -> None:
    call = _Call(inputs, lse)
    call.tensors.grad_out, call.tensors.grad_q = grad_out.data_ptr(), grads.q.data_ptr()
    call.tensors.offsets = grads.offsets.data_ptr()
    for entry, grad in zip(call.levels, grads.levels, strict=True):
        entry.grad = grad.data_ptr()
    call.run("backward")


def draw_bits(seed: Tensor, batch: int, heads: int, queries: int, longest: int, dropout_p: float) -> Tensor:
    """As `dropout.draw_bits`, on the CPU."""
    kernels, words = library(), num_words(longest)
    assert kernels is not None
    bits = torch.empty(batch, heads, queries * words, dtype=torch.int32)
    shape = _Shape(batch, heads, queries, longest, words, threads=torch.get_num_threads())
    values = (ctypes.c_uint64(int(seed)), ctypes.c_uint32(threshold(dropout_p)))
    kernels.cross_layer_attention_draw(ctypes.byref(shape), *values, ctypes.c_void_p(bits.data_ptr()))
    return bits


attend = make_operator("cross_layer_attention_native", draw_bits, words_by_query, _fill_outputs, _fill_grads)
