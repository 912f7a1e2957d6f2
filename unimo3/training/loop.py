"""The training loop, top to bottom: batch, losses, backward, step, figures, save.

Source: nanoGPT's train.py and lingua's apps/main/train.py for the shape of it.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.saver import Saver
from unimo3.distributed import broadcast_object, world
from unimo3.errors import DivergedError, Interrupted
from unimo3.objectives.exchange import sum_over_ranks
from unimo3.training.engine import ds_config_errors, gradient_norm, step_was_skipped
from unimo3.training.evaluation import Evaluation, to_device
from unimo3.training.lr_schedule import lr_scale, set_lr
from unimo3.training.metrics import Figures, peak_memory_bytes, read_metrics
from unimo3.training.optim import OptimArgs
from unimo3.training.preempt import STOP_FILE, StopListener, StopRequest, StopRequested
from unimo3.training.run import Run
from unimo3.training.watch import Watch

log = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass(frozen=True)
class TrainingArgs:
    """Length, batch and engine of the run."""

    steps: int = 100_000
    """Optimizer steps of the whole run; the learning rate falls to zero over them."""
    stop_after: int = 0
    """Optimizer steps after which this process saves and ends with status 0, short of `steps`. 0: at `steps`."""
    global_batch: int = 4096
    """Pairs an optimizer step, over all ranks; constant in a run."""
    micro_batch: int = 32
    """Pairs one rank computes at a time."""
    ds_config: str = "ds_configs/zero3_bf16.json"
    """DeepSpeed configuration file."""
    activation_checkpointing: bool = False
    """Whether layers keep their inputs alone for the backward pass and compute the rest again: less memory, about a
    third more time."""
    compile_towers: bool = False
    """Whether both towers are compiled with torch.compile at the first step; needs a compiler on every node."""
    eval_every: int = 0
    """Optimizer steps between evaluations on held-out data. 0: at the end alone."""
    stall_after_s: float = 900.0
    """Seconds without progress after which a rank writes its stacks and the process ends with status 71, to be started
    again; four times as long while starting or saving. More than the longest step. 0: never."""
    max_skipped: int = 10
    """Optimizer steps in a row that are skipped for a loss or gradient that is not finite; one more ends the run with
    status 70. Under fp16 a gradient alone does not count: its loss scaling expects that."""
    log_every: int = 50
    """Optimizer steps between progress lines where the output is no terminal, and between heat maps of the gates."""

    def validate(self) -> list[str]:
        """Say what is wrong with these settings, one line an error."""
        found = [
            f"training.{name}: {getattr(self, name)}: at least 1 is needed"
            for name in ("steps", "log_every")
            if getattr(self, name) < 1
        ]
        found += [
            f"training.{name}: {getattr(self, name)}: 0 or a number of steps is needed"
            for name in ("stop_after", "eval_every", "max_skipped")
            if getattr(self, name) < 0
        ]
        if not 0 <= self.stall_after_s < math.inf:
            found.append(f"training.stall_after_s: {self.stall_after_s}: 0 or a number of seconds is needed")
        return found + ds_config_errors(self.ds_config)


def train(
    run: Run,
    engine: Any,
    batches: Iterable[list[Batch]],
    training: TrainingArgs,
    optim: OptimArgs,
    checkpoint: CheckpointArgs,
    stop: StopListener,
    watch: Watch,
    evaluation: Evaluation | None = None,
    only_evaluates: bool = False,
) -> None:
    """Train from `run.step` to the end, or until asked to stop.

    Args:
        run: the run's folder, figures and state; its `step` counts the optimizer steps done.
        engine: the DeepSpeed engine over a task: batch -> dict with ``loss``.
        batches: the micro-batches of each optimizer step, from `run.step` on.
        evaluation: figures on held-out data, at the end and every `training.eval_every` steps.
        only_evaluates: evaluate where the run stands, whether that was done before or not, and train no further.

    Raises:
        Interrupted: a stop signal or the file ``requeue`` came on any rank; a checkpoint has been saved.
        CheckpointError: a save failed, at this step or behind the steps before.
        DataError: too many samples could not be used.
        DivergedError: losses or gradients stay not finite; nothing of it has been saved.
    """
    rank, num_ranks = world()
    last_step = run.step if only_evaluates else min(training.steps, training.stop_after or training.steps)
    steps: Iterator[list[Batch]] = iter(batches)
    saver = Saver(engine, run.folder, checkpoint)
    first_step, num_in_a_row, is_cut_short = run.step, 0, False
    progress = tqdm(total=training.steps, initial=run.step, unit="step", disable=None if rank == 0 else True)
    stop.watch(run.folder)

    def save_now() -> None:
        watch.beat("save", run.step)
        if run.step > first_step:  # else it was resumed from there
            saver.ensure(run.state())

    def evaluate() -> None:
        nonlocal is_cut_short, last_step
        assert evaluation is not None
        guard = _EvaluationGuard(stop, watch, run.step, engine.device)
        figures = evaluation.figures(run.step, guard)
        is_cut_short = guard.is_cut  # the next start makes up for it
        if figures is not None:
            if evaluation.best is not None:
                evaluation.best.consider(run, figures, save_now)
            _record_evaluation(run, evaluation, figures)
            last_step = evaluation.best.last_step(run, last_step) if evaluation.best is not None else last_step
        engine.train()

    if evaluation is not None and evaluation.best is not None:
        last_step = evaluation.best.last_step(run, last_step)  # the run may have ended early before
    if evaluation is not None and (
        only_evaluates or _evaluation_is_missing(run, evaluation, last_step, training.eval_every)
    ):
        evaluate()
    started = time.perf_counter()
    engine.train()
    while True:
        watch.beat("data", run.step)
        micro_batches = None
        try:
            if run.step < last_step:
                with stop.interruptible():
                    micro_batches = next(steps)
        except StopRequested:
            pass
        watch.beat("wait", run.step)
        request = stop.agree(engine.device, must_stop=micro_batches is None and run.step < last_step)
        if request != StopRequest.NONE or micro_batches is None:
            break
        scale = lr_scale(run.step, training.steps, optim.warmup_ratio)
        set_lr(engine.optimizer, scale)
        sums: dict[str, torch.Tensor] = {}
        for batch in micro_batches:
            watch.beat("compute" if run.step > first_step else "start", run.step)
            report = engine(to_device(batch, engine.device))
            engine.backward(report["loss"])
            engine.step()
            for name, value in report.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float()
        run.step += 1
        run.record_keys(micro_batches)

        # One small all-reduce a step: mean figures, bad samples, whether any rank saw a save fail. What the gates did
        # is shown as this rank saw it.
        names = sorted(name for name, value in sums.items() if value.numel() == 1)
        maps = {name: value / len(micro_batches) for name, value in sums.items() if value.numel() > 1}
        vector = torch.stack([sums[name].reshape(()) / len(micro_batches) for name in names])
        num_bad = sum(int(batch["num_replaced"]) for batch in micro_batches)
        extra = torch.tensor([num_bad, saver.has_failed], dtype=torch.float32, device=vector.device)
        reduced = sum_over_ranks(torch.cat([vector, extra])).tolist()
        means = {name: value / num_ranks for name, value in zip(names, reduced[:-2], strict=True)}
        num_bad, save_failed = (int(value) for value in reduced[-2:])
        run.count_bad_samples(num_bad)
        norm = gradient_norm(engine)
        is_finite = math.isfinite(means["loss"]) and (
            engine.fp16_enabled() or (math.isfinite(norm) and not step_was_skipped(engine))
        )
        num_in_a_row = 0 if is_finite else num_in_a_row + 1
        run.num_skipped += step_was_skipped(engine)
        if not is_finite:
            _handle_non_finite_loss(run, {**means, "grad_norm": norm}, num_in_a_row, training.max_skipped)

        now = time.perf_counter()
        figures = {
            "step": run.step,
            "samples": run.step * training.global_batch,
            **{name: value if math.isfinite(value) else None for name, value in means.items()},
            "lr": optim.lr * scale,
            "grad_norm": norm if math.isfinite(norm) else None,
            "pairs_per_s": training.global_batch / (now - started),
            "step_s": now - started,
            "bad_samples": run.num_bad_samples,
            "skipped_steps": run.num_skipped,
            "memory_bytes": peak_memory_bytes(),
        }
        started = now
        is_shown = run.step % training.log_every == 0 or run.step in (1, training.steps)
        run.metrics.write(figures | ({name: value.tolist() for name, value in maps.items()} if is_shown else {}))
        _show(progress, figures, training, is_shown)

        run.record_saves(saver.take_finished())
        if save_failed:
            saver.wait()
        if run.step == last_step or run.step % checkpoint.every_steps == 0:
            watch.beat("save", run.step)
            saver.save(run.state(), is_last=run.step == last_step)
            started = time.perf_counter()
        if evaluation is not None and _evaluation_is_due(run.step, last_step, training.eval_every):
            evaluate()
            started = time.perf_counter()
    progress.close()
    save_now()
    run.record_saves(saver.take_finished())
    watch.close()
    where = f"step {run.step} of {training.steps} is saved in {run.folder}"
    if only_evaluates:
        where = f"of step {run.step} in {run.folder}"
    if request == StopRequest.REQUEUE and (run.step < last_step or is_cut_short):
        stop.done()
        asked = f"asked to stop ({stop.name or 'by another rank'})"
        if only_evaluates:
            raise Interrupted(
                f"{asked} amid the evaluation {where}, of which nothing is kept; start the same command to do it again"
            )
        raise Interrupted(f"{asked}; {where}; start the same command to continue")
    if rank == 0 and request == StopRequest.STOP and run.step < last_step:
        log.info("stopped by the file %s; %s; remove it to continue", run.folder / STOP_FILE, where)
    elif rank == 0 and only_evaluates:
        log.info("done: the evaluation %s", where)
    elif rank == 0:
        log.info("done: step %d of %d; checkpoints and figures are in %s", run.step, training.steps, run.folder)


class _EvaluationGuard:
    """Hands evaluation batches on, unless a rank was asked to stop; the wait for one is cut short as in training."""

    def __init__(self, stop: StopListener, watch: Watch, step: int, device: torch.device):
        self.is_cut = False
        self._stop, self._watch, self._step, self._device = stop, watch, step, device

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; every rank takes as many."""
        while True:
            batch, is_waiting = None, True
            self._watch.beat("evaluate", self._step)
            try:
                with self._stop.interruptible():
                    batch = next(batches, None)
                    is_waiting = False
            except StopRequested:
                pass
            request = self._stop.agree(self._device, must_stop=is_waiting)
            self.is_cut = request != StopRequest.NONE
            if self.is_cut or batch is None:
                return
            yield batch


def _handle_non_finite_loss(run: Run, figures: Figures, num_in_a_row: int, max_skipped: int) -> None:
    listed = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    if num_in_a_row > max_skipped:
        raise DivergedError(
            f"step {run.step}: the loss or its gradient is not finite ({listed}), {num_in_a_row} steps in a row; start "
            "again under another run.name with a lower optim.lr"
        )
    if world()[0] == 0:
        log.warning(
            "step %d is skipped: the loss or its gradient is not finite (%s), %d in a row of at most %d",
            run.step, listed, num_in_a_row, max_skipped,
        )  # fmt: skip


def _evaluation_is_due(step: int, last_step: int, every: int) -> bool:
    return step >= last_step or bool(every and step and step % every == 0)


def _evaluation_is_missing(run: Run, evaluation: Evaluation, last_step: int, every: int) -> bool:
    """Whether the step at which a run was resumed has not been evaluated on this data: a kill or a stop came first."""
    done = [
        record
        for record in read_metrics(run.folder, group="eval")
        if record["step"] == run.step and record.get("data") == evaluation.fingerprint
    ]
    # Rank 0's view holds for all: it is the one that writes the file.
    missing: bool = broadcast_object(_evaluation_is_due(run.step, last_step, every) and not done)
    return missing


def _record_evaluation(run: Run, evaluation: Evaluation, figures: Figures) -> None:
    data = {"data": evaluation.fingerprint} | ({"split": evaluation.split} if evaluation.split else {})
    run.metrics.write({"step": run.step, **data, **figures}, group="eval")
    if world()[0] == 0:
        shown = " ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))
        log.info("held-out data at step %d  %s", run.step, shown)


def _show(progress: tqdm, figures: Figures, training: TrainingArgs, is_shown: bool) -> None:
    """A progress bar on a terminal, else a line now and then, on rank 0."""
    losses = {name: math.nan if value is None else value for name, value in figures.items() if name.startswith("loss")}
    progress.update(1)
    progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
    step = figures["step"]
    if world()[0] == 0 and progress.disable and is_shown:
        left_s = (training.steps - step) * figures["step_s"]
        shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        log.info(
            "step %d/%d  %s  lr %.2e  %.1f pairs/s  %.0f s left",
            step, training.steps, shown, figures["lr"], figures["pairs_per_s"], left_s,
        )  # fmt: skip
