"""Export of a ZeRO-3 checkpoint: ours against DeepSpeed's zero_to_torch.py --dtype fp16 --safe_serialization.

The checkpoint is made here, in DeepSpeed's layout and for 2 ranks: training a model of 1B parameters would not fit
the machine. Its shapes are those of a transformer with an embedding. Both programs run as separate processes, by turns,
on the same files and from the page cache; a time includes starting Python. DeepSpeed's program neither flushes its
files to disk nor reads them back; ours does both, and is measured without reading back too.

Source: DeepSpeed 0.19, runtime/engine.py (_get_zero_model_states, _save_zero_checkpoint) for the files.
"""

import math
import os
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

OURS, OURS_UNVERIFIED, DEEPSPEED = "ours", "ours, --no-verify", "zero_to_torch"
CONTESTANTS = (OURS, OURS_UNVERIFIED, DEEPSPEED)
NUM_RANKS = 2
TAG = "global_step4"
_VOCABULARY, _WIDTH = 50265, 1024
_PIECE_ELEMENTS = 2**22
_SAMPLE_S = 0.005


@dataclass(frozen=True)
class Measured:
    """One program's run.

    Attributes:
        peak_bytes: largest sum of resident memory over the process and all its children.
    """

    seconds: float
    peak_bytes: int


def shapes_of(num_parameters: int) -> list[dict[str, Any]]:
    """Shapes of a transformer of about that many parameters, in two parameter groups: matrices, and the rest.

    A model too small for the embedding gets a smaller one.
    """
    import torch

    rows = min(_VOCABULARY, num_parameters // (2 * _WIDTH))
    matrices: dict[str, torch.Size] = OrderedDict({"embed.weight": torch.Size([rows, _WIDTH])})
    vectors: dict[str, torch.Size] = OrderedDict()
    remaining = num_parameters - rows * _WIDTH
    layer = 0
    while remaining > 0:
        # The last layer's inner width takes the remaining parameters.
        inner = min(4 * _WIDTH, max(1, (remaining - 4 * _WIDTH**2) // (2 * _WIDTH)))
        name = f"layers.{layer}"
        for part in ("query", "key", "value", "output"):
            matrices[f"{name}.{part}.weight"] = torch.Size([_WIDTH, _WIDTH])
            vectors[f"{name}.{part}.bias"] = torch.Size([_WIDTH])
        matrices[f"{name}.up.weight"] = torch.Size([inner, _WIDTH])
        matrices[f"{name}.down.weight"] = torch.Size([_WIDTH, inner])
        vectors[f"{name}.norm.weight"] = torch.Size([_WIDTH])
        remaining -= 4 * _WIDTH**2 + 5 * _WIDTH + 2 * inner * _WIDTH
        layer += 1
    return [matrices, vectors]


def write_checkpoint(
    folder: Path,
    groups: list[dict[str, Any]],
    *,
    num_ranks: int = NUM_RANKS,
    weights: bool = True,
    moments: bool = True,
    seed: int = 0,
) -> None:
    """Write `folder`/latest and the files of all ranks below it, without ever having a partition in memory.

    Args:
        groups: of parameters, their shapes by name.
        weights: fill the weights. False: they stay holes too, and so do the moments.
        moments: fill the optimizer's moments too. False: they stay holes in the files, which read as zeros and take no
            room on the disk; export does not read them.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from torch.serialization import skip_data

    lengths = [sum(math.ceil(shape.numel() / num_ranks) for shape in group.values()) for group in groups]
    names = [name for group in groups for name in group]
    checkpoint = folder / TAG
    checkpoint.mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    for rank in range(num_ranks):
        # Never touched, these take no memory; `skip_data` leaves holes in the file where their values belong.
        flat = [torch.nn.Parameter(torch.empty(length)) for length in lengths]
        state = {
            number: {"step": torch.tensor(4.0), "exp_avg": torch.empty(length), "exp_avg_sq": torch.empty(length)}
            for number, length in enumerate(lengths)
        }
        settings = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}
        optimizer = {
            "state": state,
            "param_groups": [
                settings | {"weight_decay": decay, "params": [number]}
                for number, decay in zip(range(len(groups)), (0.01, 0.0), strict=False)
            ],
        }
        partition = {
            "zero_stage": ZeroStageEnum.weights,
            "loss_scaler": LossScaler(1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": num_ranks,
            "optimizer_state_dict": optimizer,
            "fp32_flat_groups": flat,
        }
        path = checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        with skip_data():
            torch.save({"optimizer_state_dict": partition, "ds_config": ds_config, "ds_version": "0.19.8"}, path)
        if weights:
            _fill(path, moments, seed + rank)
        module = OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in names)
        model = {
            "module": module,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": groups,
            "frozen_param_shapes": None,
            "shared_params": {},
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": 4,
            "global_samples": 32,
            "dp_world_size": num_ranks,
            "mp_world_size": 1,
            "ds_config": ds_config,
            "ds_version": "0.19.8",
        }
        torch.save(model, checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


def measure(command: Sequence[str], output: Path) -> Measured:
    """Run a command to its end; its time, and the peak of its process tree's memory.

    Raises:
        RuntimeError: it failed.
    """
    with output.open("w") as file:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(_SAMPLE_S)
        seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output.read_text()[-3000:]}")
    return Measured(seconds, peak)


def tree_bytes(process_id: int) -> int:
    """Resident memory of a process and of all below it; shared pages count once for each."""
    total, waiting = 0, [process_id]
    while waiting:
        current = waiting.pop()
        try:
            pages = int(Path(f"/proc/{current}/statm").read_text().split()[1])
            tasks = list(Path(f"/proc/{current}/task").iterdir())
            children = [child for task in tasks for child in (task / "children").read_text().split()]
        except (OSError, IndexError):
            continue  # it has just ended
        total += pages * os.sysconf("SC_PAGE_SIZE")
        waiting += map(int, children)
    return total


def command_of(contestant: str, folder: Path, out: Path) -> list[str]:
    """How a contestant is started; both write files of the same size."""
    if contestant == DEEPSPEED:
        flags = ["--dtype", "fp16", "--safe_serialization", "--max_shard_size", "1GB"]
        return [sys.executable, "-m", "deepspeed.utils.zero_to_torch", str(folder), str(out), *flags]
    flags = ["--dtype", "fp16", "--max-shard-size", "1GB"]
    flags += ["--no-verify"] if contestant == OURS_UNVERIFIED else []
    return [sys.executable, "-m", "pretrain.export", str(folder), "--out", str(out), *flags]


def compare(folder: Path, work: Path, rounds: int, contestants: Sequence[str] = CONTESTANTS) -> dict[str, Measured]:
    """Run the contestants by turns on one checkpoint.

    Args:
        folder: contains ``latest``.
        work: gets the exported folders; each is removed after its run.

    Returns:
        Median time and largest peak of each.
    """
    runs: dict[str, list[Measured]] = {contestant: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            out = work / "exported"
            # Unwritten pages of the previous run must not slow this one down, and the system drops pages in between.
            os.sync()
            for path in sorted((folder / TAG).iterdir()):
                _read_once(path)
            runs[contestant].append(measure(command_of(contestant, folder, out), work / "output.txt"))
            shutil.rmtree(out)
    return {
        contestant: Measured(median(run.seconds for run in done), max(run.peak_bytes for run in done))
        for contestant, done in runs.items()
    }


def check_equal(folder: Path, work: Path) -> None:
    """Export with both programs and compare all tensors.

    Raises:
        AssertionError: they differ.
    """
    import torch
    from safetensors import safe_open

    opened: list[dict[str, Any]] = []
    for contestant in (OURS, DEEPSPEED):
        out = work / contestant
        measure(command_of(contestant, folder, out), work / "output.txt")
        opened.append({})
        for path in out.glob("*.safetensors"):
            file = safe_open(path, framework="pt")
            opened[-1] |= dict.fromkeys(file.keys(), file)
    assert opened[0].keys() == opened[1].keys()
    for name, file in opened[0].items():
        assert torch.equal(file.get_tensor(name), opened[1][name].get_tensor(name)), name
    for contestant in (OURS, DEEPSPEED):
        shutil.rmtree(work / contestant)


def table(results: dict[int, dict[str, Measured]]) -> str:
    """Markdown, a row for each size and program.

    Args:
        results: by number of parameters.
    """
    lines = ["| parameters | program | s | of DeepSpeed's time | peak MB |", "| ---: | --- | ---: | ---: | ---: |"]
    for count, measured in results.items():
        for contestant, run in measured.items():
            ratio = run.seconds / measured[DEEPSPEED].seconds
            lines.append(
                f"| {count / 1e9:.2f}B | {contestant} | {run.seconds:.2f} | {ratio:.2f} | {run.peak_bytes / 1e6:.0f} |"
            )
    return "\n".join(lines)


def _fill(path: Path, moments: bool, seed: int) -> None:
    """Put normal values where the file has holes: weights, and squares of small ones as moments."""
    import torch

    from unimo3.checkpoint.torch_file import load_structure

    generator = torch.Generator().manual_seed(seed)
    partition = load_structure(path)["optimizer_state_dict"]
    with path.open("r+b") as file:
        for number, flat in enumerate(partition["fp32_flat_groups"]):
            _fill_tensor(file, flat, lambda values: values.normal_(0, 0.02, generator=generator))
            state = partition["optimizer_state_dict"]["state"][number]
            _fill_tensor(file, state["step"], lambda values: values.fill_(4.0))
            if moments:
                _fill_tensor(file, state["exp_avg"], lambda values: values.normal_(0, 1e-4, generator=generator))
                _fill_tensor(
                    file, state["exp_avg_sq"], lambda values: values.normal_(0, 1e-4, generator=generator).square_()
                )


def _fill_tensor(file: Any, tensor: Any, make: Callable[[Any], Any]) -> None:
    import torch

    file.seek(tensor.start)
    for first in range(0, tensor.numel(), _PIECE_ELEMENTS):
        values = torch.empty(min(_PIECE_ELEMENTS, tensor.numel() - first))
        make(values)
        file.write(values.numpy().data)


def _read_once(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb") as file:
        while file.read(2**24):
            pass
