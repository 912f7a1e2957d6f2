"""The first minutes on a GPU: are the kernels right, how fast are they, and does a run train, resume and export?

Stages in order of value, each in a process of its own, so that a failed one does not end the others:

    right        the Triton kernels against float64, and the same bits on two runs
    contestants  the kernels against PyTorch's ways, at the sizes of the recipe `base`
    step         a training step of `base` in bf16 against transformers' BridgeTower
    run          with deepspeed: 20 steps of ZeRO-3, killed and resumed, exported in fp16
    variants     with deepspeed: fp16 with loss scaling, activation checkpointing, compiled towers, apex if present

Every line is printed and written when it is measured. A second call continues where the first ended: in the three
stages of several cases (`RESUMED`) with the next case, in the others with the stage.

Source: none.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import kernel
from benchmarks.report import ROOT, write_report
from unimo3.checkpoint import store
from unimo3.errors import CommandParser, ConfigError, exit_with_status
from unimo3.kernels.cross_layer_attention import cross_layer_attention_reference
from unimo3.kernels.cross_layer_attention.dropout import draw_bits, draw_seed
from unimo3.training.metrics import read_metrics

# Packages that a stage cannot do without.
_OF_A_RUN = ("deepspeed", "webdataset", "transformers", "timm", "jsonargparse", "safetensors", "tokenizers")
NEEDS = {"step": ("transformers", "timm", "jsonargparse"), "run": _OF_A_RUN, "variants": _OF_A_RUN}
RUN_STEPS = 20
# A line of these is one case, under its label: a second call measures the others.
RESUMED = ("right", "contestants", "variants")
# Of a contestant that is to be compared, relative to the largest value; a rounding of bfloat16 is 0.004.
LARGEST_ERROR = 0.05
# Of a stage whose time is over, to end what it has started.
GRACE_S = 5.0


@dataclass(frozen=True)
class Machine:
    """Where the stages run: a GPU, or with `is_dry` a CPU with sizes that only try the stages.

    Attributes:
        measured: labels of a stage's cases that an earlier call measured.
    """

    is_dry: bool
    measured: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """The device of the kernels."""
        return torch.device("cpu" if self.is_dry else "cuda")


def right(machine: Machine) -> Iterator[str]:
    """The kernels' largest error, forward and of every gradient, next to that of plain operations."""
    from unimo3.kernels.cross_layer_attention import launch

    text, image = (5, 9) if machine.is_dry else (50, 325)
    batch, heads = (1, 2) if machine.is_dry else (8, 12)
    # The interpreter multiplies bfloat16 wrongly.
    dtypes = (torch.float16,) if machine.is_dry else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for queries, keys, padded in ((text, image, False), (image, text, True), (image, image, True)):
            for dropout_p in (0.0, 0.1):
                case = kernel.Case("right", batch, heads, queries, keys, 64, 3, padded, dtype, dropout_p)
                if case.label in machine.measured:
                    continue
                inputs, grad = kernel.draw(case, machine.device)
                q, levels, gate, mask, _ = inputs.values()
                masks = None if mask is None else [mask]

                def results(attend: Callable[..., torch.Tensor], leaves: list, slope: torch.Tensor) -> list:
                    torch.manual_seed(0)
                    out = attend(leaves[0], leaves[2:], leaves[1])
                    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]

                def ours(q, levels, gate):  # type: ignore[no-untyped-def]
                    return launch.attend(q, levels, gate, masks, dropout_p)  # noqa: B023

                def plain(q, levels, gate):  # type: ignore[no-untyped-def]
                    bits = draw_bits(draw_seed(q.device), batch, heads, queries, keys, dropout_p) if dropout_p else None  # noqa: B023
                    return cross_layer_attention_reference(q, levels, gate, masks, bits, dropout_p)  # noqa: B023

                leaves = [q, gate, *levels]
                actual, again, simple = (results(one, leaves, grad) for one in (ours, ours, plain))
                exact = results(plain, [leaf.detach().double().requires_grad_() for leaf in leaves], grad.double())
                errors = [kernel.largest_error(one, exact) for one in (actual, simple)]
                same = all(torch.equal(one, other) for one, other in zip(actual, again, strict=True))
                bits = "same bits twice" if same else "OTHER BITS ON THE SECOND RUN"
                yield f"{case.label}: error {errors[0]:.1e}, of plain operations {errors[1]:.1e}; {bits}"


def contestants(machine: Machine) -> Iterator[str]:
    """The kernel benchmark's cases of `base`; one line a case with the best other."""
    if machine.is_dry:
        cases = [case for case in kernel.cpu_cases() if case.name == "tiny"][:1]
    else:
        cases = [case for case in kernel.gpu_cases() if case.name == "base"]
    names = kernel.CPU_CONTESTANTS[:2] if machine.is_dry else kernel.GPU_CONTESTANTS
    for case in cases:
        if case.label not in machine.measured:
            results = kernel.measure(case, names, 1 if machine.is_dry else 15, machine.device)
            yield f"{case.label}: {compared(results)}"


def compared(results: dict[str, kernel.Result | str]) -> str:
    """Ours next to the best other that is right; who failed or is wrong."""
    timed = {name: result for name, result in results.items() if isinstance(result, kernel.Result)}
    parts = [f"{name} failed ({result})" for name, result in results.items() if isinstance(result, str)]
    # An error that is no number is wrong, too.
    wrong = [name for name, one in timed.items() if one.error is not None and not one.error <= LARGEST_ERROR]
    parts += [f"{name} is WRONG (error {timed[name].error:.1e})" for name in wrong]
    others = {name: result for name, result in timed.items() if name not in (kernel.OURS, *wrong)}
    of_ours = timed.get(kernel.OURS)
    if timed:
        each = ", ".join(f"{name} {result.both_s * 1e6:.0f}" for name, result in timed.items())
        parts.insert(0, f"us forward and backward: {each}")
    if of_ours and others:
        best = min(others, key=lambda name: others[name].both_s)
        parts.insert(0, f"{others[best].both_s / of_ours.both_s:.2f} times as fast as {best}")
    if of_ours and of_ours.host_s is not None:
        parts.append(f"ours takes {of_ours.host_s * 1e6:.0f} us of the host")
    return "; ".join(parts)


def step(machine: Machine) -> Iterator[str]:
    """A training step against BridgeTower, the operations a second, and the planned memory."""
    size, rounds = ("tiny", "1") if machine.is_dry else ("base", "8")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "step.md")
        options = ["--size", size, "--rounds", rounds, "--attention", "sdpa", "--out", str(out)]
        output_of("benchmarks.step", *options)
        rows = [line for line in out.read_text().splitlines() if line.startswith("|") and "---" not in line]
    yield from rows
    recipe = f"pretrain/recipes/{'tiny' if machine.is_dry else 'base'}.yaml"
    # MLM and ITM alone, as the benchmark has them.
    options = ["--config", recipe, "--gpus", "1", "--objectives.itc.weight", "0", "--json"]
    plan = json.loads(output_of("pretrain.plan", *options))
    cells = next(row for row in rows if row.startswith("| cross_layer |")).split("|")
    parameters, pairs_s, peak_mib = (float(cells[index].replace(",", "")) for index in (2, 3, -3))
    flops, peak_flops = sum(plan["flops_per_pair"].values()), plan["machine"]["peak_flops"]
    reached, most = pairs_s * flops / 1e12, peak_flops / 1e12
    yield f"cross_layer: {reached:.1f} TFLOP/s, {reached / most:.1%} of an H100's {most:.0f}"
    each = plan["activation_bytes_per_pair"]
    activations = next(iter(each.values()))["at_most"] * step_batch(machine)
    # The benchmark's weights, gradients and AdamW's two moments, in float32.
    planned = (activations + 16 * parameters) / 2**20
    yield f"cross_layer: {peak_mib:.0f} MiB at the peak; planned: {planned:.0f} MiB of states and activations"


def step_batch(machine: Machine) -> int:
    """Pairs of the step benchmark's batch."""
    from benchmarks.step import BATCHES

    return BATCHES["tiny" if machine.is_dry else "base"]


def run(machine: Machine) -> Iterator[str]:
    """A run of the recipe `tiny`: killed once it has saved, resumed to its end, and exported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training = _training(machine, folder, "run", [])
        steps = 8 if machine.is_dry else RUN_STEPS
        options = ["--training.steps", str(steps), "--checkpoint.every_steps", str(steps // 4)]
        of_run = folder / "runs" / "run"
        process = subprocess.Popen([sys.executable, "-m", *training, *options], cwd=ROOT, start_new_session=True)
        try:
            while process.poll() is None and not store.list_checkpoints(of_run):
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the run was not killed: it exited with status {process.returncode}")
        before = read_metrics(of_run)
        yield f"killed after step {before[-1]['step']}; {_losses(before)}"
        resumed_at = store.step_of(store.list_checkpoints(of_run)[-1])
        begun = time.monotonic()
        output_of(*training, *options)
        after = [record for record in read_metrics(of_run) if record["step"] > resumed_at]
        took = f"{time.monotonic() - begun:.0f} s"
        yield f"resumed from step {resumed_at} to {after[-1]['step']} in {took}; {_losses(after)}"
        output_of("pretrain.export", str(of_run), "--out", str(folder / "weights"), "--dtype", "fp16")
        size = sum(path.stat().st_size for path in (folder / "weights").glob("*.safetensors"))
        yield f"exported in fp16: {size / 1e6:.1f} MB"


def variants(machine: Machine) -> Iterator[str]:
    """Three steps with each of the settings that a first run may want."""
    fp16 = ["--training.ds_config", "ds_configs/zero3_fp16.json"]
    options = {
        "activation checkpointing": ["--training.activation_checkpointing", "true"],
        "compiled towers": ["--training.compile_towers", "true"],
        "fp16 with loss scaling": fp16,
        "apex's layer norm": ["--kernels.layer_norm", "apex"],
        "apex's FusedAdam": ["--optim.fused", "apex"],
    }
    if machine.is_dry:
        options = {name: options[name] for name in ("activation checkpointing",)}
    elif importlib.util.find_spec("apex") is None:
        options = {name: words for name, words in options.items() if "apex" not in name}
        if "apex" not in machine.measured:
            yield "apex: is not installed; its layer norm and FusedAdam are not tried"
    options = {name: words for name, words in options.items() if name not in machine.measured}
    with tempfile.TemporaryDirectory() as name:
        for number, (label, words) in enumerate(options.items()):
            training = _training(machine, Path(name), f"variant{number}", words)
            begun = time.monotonic()
            try:
                output_of(*training, "--training.steps", "3")
            except RuntimeError as error:
                yield f"{label}: {error}"
                continue
            records = read_metrics(Path(name, "runs", f"variant{number}"))
            yield f"{label}: three steps in {time.monotonic() - begun:.0f} s with the start; {_losses(records)}"


STAGES: dict[str, Callable[[Machine], Iterator[str]]] = {
    "right": right,
    "contestants": contestants,
    "step": step,
    "run": run,
    "variants": variants,
}


def output_of(*command: str) -> str:
    """What ``python -m command`` prints.

    Raises:
        RuntimeError: it fails; the message has its status and last lines.
    """
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        end = " / ".join(result.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"python -m {command[0]}: status {result.returncode}: {end}")
    return result.stdout


def _training(machine: Machine, folder: Path, name: str, options: list[str]) -> list[str]:
    """The training command of a run of this name, on toy data that the first call makes."""
    shards = folder / "shards"
    if not shards.exists():
        images = "60" if machine.is_dry else "1000"
        output_of("pretrain.toy", str(folder / "data"), "--images", images, "--size", "64", "--seed", "0")
        coco = ["coco", "--src", str(folder / "data" / "coco"), "--out", str(shards), "--tokenizer-vocab", "512"]
        output_of("pretrain.prepare_shards", *coco, "--shard-size", "64")
    sizes = ["--training.global_batch", "8", "--training.micro_batch", "8"] if machine.is_dry else []
    config = "ds_configs/zero3_fp32.json" if machine.is_dry else "ds_configs/zero3_bf16.json"
    data = ["--data.train", str(shards / "train"), "--data.tokenizer", str(shards / "tokenizer")]
    run = ["--run.dir", str(folder / "runs"), "--run.name", name, "--training.ds_config", config]
    return ["pretrain.train", "--config", "pretrain/recipes/tiny.yaml", *run, *data, *sizes, *options]


def _losses(records: list[dict]) -> str:
    return "losses " + ", ".join(f"{record['loss']:.4f}" for record in records)


def do_stage(name: str, machine: Machine, log: Path) -> None:
    """Run what is missing of a stage and append each of its lines to the log; a last record marks its end."""
    missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]

    def record(**values: object) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": name, **values}) + "\n")

    if missing:
        record(line=f"not run: {', '.join(missing)} is not installed")
        return
    labels = frozenset(line.split(": ")[0] for line in read_log(log)[0][name])
    for line in STAGES[name](replace(machine, measured=labels)):
        print(line, flush=True)
        record(line=line)
    record(ended=True)


def end(stage: subprocess.Popen) -> None:
    """End a stage that still runs, and whatever it has started."""
    if stage.poll() is None:
        stage.terminate()
        with suppress(subprocess.TimeoutExpired):
            stage.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(stage.pid, signal.SIGKILL)
    stage.wait()


def read_log(log: Path) -> tuple[dict[str, list[str]], set[str]]:
    """Lines of each stage, and the stages that ended."""
    lines: dict[str, list[str]] = {name: [] for name in STAGES}
    ended = set()
    for text in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        record = json.loads(text)
        if record.get("ended"):
            ended.add(record["stage"])
        else:
            lines[record["stage"]].append(record["line"])
    return lines, ended


def write(out: Path, log: Path) -> None:
    """The report of what is measured so far."""
    lines, ended = read_log(log)
    parts = []
    for name in STAGES:
        paragraphs = [f"## {name}"]
        if lines[name]:
            paragraphs.append("\n".join(f"- `{line}`" if line.startswith("|") else f"- {line}" for line in lines[name]))
        if name not in ended:
            paragraphs.append("This stage did not end." if lines[name] else "This stage has not begun.")
        parts += paragraphs
    write_report(out, "The first run on a GPU", "\n\n".join(parts))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: something cannot be used.
    """
    parser = CommandParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds in all (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these")
    parser.add_argument("--dry-run", action="store_true", help="try every stage on a CPU, with tiny sizes")
    parser.add_argument("--again", action="store_true", help="measure ended stages again, too")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="report to write; benchmarks/results/gpu_NAME.md by default")
    args = parser.parse_args(arguments)
    if args.budget <= 0:
        raise ConfigError(f"--budget {args.budget}: more than 0 seconds are needed")
    if not args.dry_run and not torch.cuda.is_available():
        raise ConfigError("no GPU is found; --dry-run tries the stages on a CPU")
    if args.dry_run and not args.out:
        raise ConfigError("--out: is needed with --dry-run, whose report is not of a GPU")
    return args


@exit_with_status
def main(arguments: list[str] | None = None) -> int:
    """Run the stages that have not ended, within the budget; status 1 if one failed."""
    args = parse(arguments)
    kind = "cpu" if args.dry_run else torch.cuda.get_device_name().lower().replace(" ", "_")
    out = args.out or ROOT / "benchmarks" / "results" / f"gpu_{kind}.md"
    log = out.with_suffix(".jsonl")
    if args.stage:
        # What a stage has started ends with it.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        do_stage(args.stage, Machine(args.dry_run), log)
        return 0
    deadline, failed = time.monotonic() + args.budget, False
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.again:
        log.unlink(missing_ok=True)
    for name in args.stages:
        lines, ended = read_log(log)
        left = deadline - time.monotonic()
        if name in ended or left <= 0:
            print(f"{name}: {'ended before' if name in ended else 'no time is left; call again'}", flush=True)
            continue
        if lines[name] and name not in RESUMED:  # of a call that was cut off
            others = [
                text for text in log.read_text(encoding="utf-8").splitlines() if json.loads(text)["stage"] != name
            ]
            log.write_text("".join(f"{text}\n" for text in others), encoding="utf-8")
        print(f"{name}, {left:.0f} s left:", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--out", str(out)]
        environment = os.environ | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if args.dry_run else {})
        options = ["--dry-run"] * args.dry_run
        # In a session of its own, so that all it has started can be ended.
        process = subprocess.Popen([*command, *options], cwd=ROOT, env=environment, start_new_session=True)
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            status = 0
            print(f"{name}: the time is over; call again", flush=True)
        finally:
            end(process)
        failed |= status != 0
        write(out, log)
    print(out)
    return int(failed)


if __name__ == "__main__":
    main()
