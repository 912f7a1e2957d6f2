"""The training loop: batch, losses, backward, step, metrics, save, evaluation.

Source: torchtitan's trainer.py and lingua's apps/main/train.py for the shape of it.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.saver import Saver
from unimo3.collectives import sum_over_ranks
from unimo3.distributed import broadcast_object, world
from unimo3.engine import Engine
from unimo3.errors import DivergedError, Interrupted
from unimo3.training.args import TrainingArgs
from unimo3.training.engine import gradient_norm, step_was_skipped
from unimo3.training.evaluation import Evaluation, to_device
from unimo3.training.lr_schedule import lr_scale, set_lr
from unimo3.training.metrics import Metrics, read_metrics, step_metrics
from unimo3.training.optim import OptimArgs
from unimo3.training.preempt import STOP_FILE, StopListener, StopRequest, StopRequested
from unimo3.training.profiling import StepProfiler
from unimo3.training.run import Run
from unimo3.training.watch import Watch

log = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass(frozen=True)
class _Step:
    """What this rank knows of a step that has been taken and not yet logged.

    Attributes:
        means: of its micro-batches' losses and other scalars.
        gates: its mean gate weights, which are logged as this rank has them.
        num_bad: samples that were replaced.
        was_skipped: whether the optimizer left the weights as they were.
    """

    means: dict[str, torch.Tensor]
    gates: dict[str, torch.Tensor]
    num_bad: int
    lr: float
    grad_norm: float
    was_skipped: bool
    seconds: float


class Trainer:
    """Trains from `run.step` to the end, or until asked to stop.

    Args:
        run: the run's folder, metrics and state; its `step` counts the optimizer steps done.
        engine: the DeepSpeed engine over a task: batch -> dict with ``loss``.
        batches: the micro-batches of each optimizer step, from `run.step` on.
        evaluation: metrics on held-out data, at the end and every `training.eval_every` steps.
        only_evaluates: evaluate at the run's step, even if that was done before, and do not train.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        batches: Iterable[list[Batch]],
        training: TrainingArgs,
        optim: OptimArgs,
        checkpoint: CheckpointArgs,
        listener: StopListener,
        watch: Watch,
        evaluation: Evaluation | None = None,
        only_evaluates: bool = False,
    ):
        self.run, self.engine = run, engine
        self.training, self.optim, self.checkpoint = training, optim, checkpoint
        self.listener, self.watch = listener, watch
        self.evaluation, self.only_evaluates = evaluation, only_evaluates
        self.rank, self.num_ranks = world()
        self.batches: Iterator[list[Batch]] = iter(batches)
        self.saver = Saver(engine, run.folder, checkpoint)
        self.profiler = StepProfiler(run.folder, self.rank)
        self.first_step = run.step
        self.last_step = run.step if only_evaluates else min(training.steps, training.stop_after or training.steps)
        self.request = StopRequest.NONE
        self._unlogged: _Step | None = None
        self._num_not_finite = 0  # steps in a row
        self._is_evaluation_cut = False
        self._started = time.perf_counter()
        self._progress = tqdm(
            total=training.steps, initial=run.step, unit="step", disable=None if self.rank == 0 else True
        )

    def train(self) -> None:
        """Train, evaluate and save.

        Raises:
            Interrupted: a stop signal or the file ``requeue`` came on any rank; a checkpoint has been saved.
            CheckpointError: a save failed, at this step or in the background of steps before.
            DataError: too many samples could not be used.
            DivergedError: losses or gradients stay not finite; nothing of it has been saved.
        """
        self.listener.watch(self.run.folder)
        if self.evaluation is not None and self.evaluation.best is not None:
            # The run may have ended early before.
            self.last_step = self.evaluation.best.last_step(self.run, self.last_step)
        if self.evaluation is not None and (self.only_evaluates or self._evaluation_is_missing(self.evaluation)):
            self.evaluate(self.evaluation)
        self.engine.train()
        self._started = time.perf_counter()
        while (micro_batches := self.next_batches()) is not None:
            with self.profiler.step(self.run.step + 1):
                self.train_step(micro_batches)
            is_save_due = self.run.step == self.last_step or self.run.step % self.checkpoint.every_steps == 0
            is_evaluation_due = self.evaluation is not None and self._is_evaluation_due()
            if is_save_due or is_evaluation_due:
                self.synchronize()  # a step whose loss diverged is not saved
            if is_save_due:
                self.save()
            if self.evaluation is not None and is_evaluation_due:
                self.evaluate(self.evaluation)
            if is_save_due or is_evaluation_due:
                self._started = time.perf_counter()
        self.finish()

    def next_batches(self) -> list[Batch] | None:
        """The micro-batches of the next step; None, on every rank, at the end or when any rank is asked to stop."""
        self.watch.beat("data", self.run.step)
        micro_batches = None
        if self.request == StopRequest.NONE and self.run.step < self.last_step:
            with suppress(StopRequested), self.listener.interruptible():
                micro_batches = next(self.batches)
        self.watch.beat("wait", self.run.step)
        # After the wait for data, so that no rank begins a step that another one skips.
        self.synchronize()
        return micro_batches if self.request == StopRequest.NONE else None

    def train_step(self, micro_batches: list[Batch]) -> None:
        """Take one optimizer step."""
        run, engine = self.run, self.engine
        scale = lr_scale(run.step, self.training.steps, self.optim.warmup_ratio)
        set_lr(engine.optimizer, scale)
        sums: dict[str, torch.Tensor] = {}
        for batch in micro_batches:
            self.watch.beat("compute" if run.step > self.first_step else "start", run.step)
            report = engine(to_device(batch, engine.device))
            engine.backward(report["loss"])
            engine.step()
            for name, value in report.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float()
        run.step += 1
        run.record_keys(micro_batches)
        run.num_skipped += step_was_skipped(engine)
        means = {name: value / len(micro_batches) for name, value in sorted(sums.items())}
        now = time.perf_counter()
        self._unlogged = _Step(
            means={name: value.reshape(()) for name, value in means.items() if value.numel() == 1},
            gates={name: value for name, value in means.items() if value.numel() > 1},
            num_bad=sum(int(batch["num_replaced"]) for batch in micro_batches),
            lr=self.optim.lr * scale,
            grad_norm=gradient_norm(engine),
            was_skipped=step_was_skipped(engine),
            seconds=now - self._started,
        )
        self._started = now

    def synchronize(self) -> None:
        """Agree on what is requested and log the last step, in one small all-reduce; every rank calls it.

        Raises:
            DataError, DivergedError: on every rank; of the last step.
            CheckpointError: on every rank; of a save in the background.
        """
        step, self._unlogged = self._unlogged, None
        can_trace = not self.profiler.is_active and self.run.step < self.last_step  # else the request waits
        wants_profile = can_trace and self.listener.wants_profile
        flags = [*self.listener.counts(), wants_profile, self.saver.has_failed, step.num_bad if step else 0]
        vector = torch.tensor(flags, dtype=torch.float32, device=self.engine.device)
        if step:
            vector = torch.cat([torch.stack(list(step.means.values())), vector])
        *values, requeue, stop, profile, save_failed, num_bad = sum_over_ranks(vector).tolist()
        self.request = max(self.request, StopRequest.of_counts(requeue, stop))
        if profile:
            self.profiler.request()
        if wants_profile:
            self.listener.prepare_profile(self.run.step + 1)
        if step:
            means = {name: value / self.num_ranks for name, value in zip(step.means, values, strict=True)}
            self.run.count_bad_samples(int(num_bad))
            self.log_step(step, means)
            self._check_finite(step, means["loss"], {**means, "grad_norm": step.grad_norm})
        self.run.record_saves(self.saver.take_finished())
        if save_failed:
            self.saver.wait()

    def log_step(self, step: _Step, means: dict[str, float]) -> None:
        """Write the metrics of the step just taken, and show them on rank 0."""
        run, training = self.run, self.training
        counts = {"bad_samples": run.num_bad_samples, "skipped_steps": run.num_skipped}
        metrics = step_metrics(run.step, training.global_batch, means, step.lr, step.grad_norm, step.seconds, counts)
        is_shown = run.step % training.log_every == 0 or run.step in (1, training.steps)
        gates = {name: value.tolist() for name, value in step.gates.items()} if is_shown else {}
        run.metrics.write(metrics | gates)
        losses = {name: math.nan if value is None else value for name, value in metrics.items() if name[:4] == "loss"}
        if self.rank == 0 and is_shown and metrics.get("single_image_ratio"):
            log.warning(
                "step %d: in %.0f%% of the micro-steps all pairs have one image_id, and contrast and matching have no "
                "wrong partner to learn from; raise training.micro_batch, or check image_id in the shards",
                run.step,
                100 * metrics["single_image_ratio"],
            )
        self._progress.update(1)
        self._progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
        if self.rank == 0 and self._progress.disable and is_shown:
            log.info(
                "step %d/%d  %s  lr %.2e  %.1f pairs/s  %.0f s left",
                run.step,
                training.steps,
                " ".join(f"{name} {value:.4f}" for name, value in losses.items()),
                metrics["lr"],
                metrics["pairs_per_s"],
                (training.steps - run.step) * metrics["step_s"],
            )

    def save(self) -> None:
        """Save a checkpoint of the step just taken."""
        self.watch.beat("save", self.run.step)
        self.saver.save(self.run.state(), is_last=self.run.step == self.last_step)

    def evaluate(self, evaluation: Evaluation) -> None:
        """Evaluate on held-out data, record the metrics, and save the checkpoint if it is the best."""
        guard = _EvaluationGuard(self.listener, self.watch, self.run.step, self.engine.device)
        metrics = evaluation.metrics(self.run.step, guard)
        self._is_evaluation_cut = guard.is_cut  # the next start evaluates again
        if metrics is not None:
            self._record_evaluation(evaluation, metrics)
            if evaluation.best is not None:
                evaluation.best.consider(self.run, metrics, lambda: self._ensure_saved(is_last=False))
                self.last_step = evaluation.best.last_step(self.run, self.last_step)
        self.engine.train()

    def finish(self) -> None:
        """Save what is not saved yet, and report how the run ended.

        Raises:
            Interrupted: the run was asked to stop before its end.
        """
        run = self.run
        self._progress.close()
        self.profiler.close()
        self._ensure_saved()
        run.record_saves(self.saver.take_finished())
        self.watch.close()
        where = f"step {run.step} of {self.training.steps} is saved in {run.folder}"
        if run.step == 0:
            where = "before the first step, so nothing is lost"
        if self.only_evaluates:
            where = f"of step {run.step} in {run.folder}"
        if self.request == StopRequest.REQUEUE and (run.step < self.last_step or self._is_evaluation_cut):
            self.listener.done()
            asked = f"asked to stop ({self.listener.name or 'by another rank'})"
            if self.only_evaluates:
                raise Interrupted(
                    f"{asked} during the evaluation {where}; its results are not saved; start the same command to "
                    "repeat it"
                )
            raise Interrupted(f"{asked}; {where}; start the same command to continue")
        if self.rank != 0:
            return
        if self.request == StopRequest.STOP and (run.step < self.last_step or self._is_evaluation_cut):
            what = "the evaluation is not finished" if self._is_evaluation_cut else where
            file = run.folder / STOP_FILE
            log.info("stopped by the file %s; %s; to continue, type: rm %s", file, what, file)
        elif self.only_evaluates:
            log.info("done: the evaluation %s", where)
        else:
            log.info(
                "done: step %d of %d; checkpoints and metrics are in %s", run.step, self.training.steps, run.folder
            )

    def _ensure_saved(self, is_last: bool = True) -> bool:
        self.watch.beat("save", self.run.step)
        # The step at which the run was resumed is saved already.
        return self.run.step == self.first_step or self.saver.ensure(self.run.state(), is_last)

    def _check_finite(self, step: _Step, loss: float, shown: Metrics) -> None:
        """Count steps in a row whose loss or gradient is not finite; under fp16 a gradient alone does not count."""
        is_finite = math.isfinite(loss) and (
            self.engine.fp16_enabled() or (math.isfinite(step.grad_norm) and not step.was_skipped)
        )
        self._num_not_finite = 0 if is_finite else self._num_not_finite + 1
        if is_finite:
            return
        listed = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self._num_not_finite > self.training.max_skipped:
            raise DivergedError(
                f"step {self.run.step}: the loss or its gradient is not finite ({listed}), {self._num_not_finite} "
                "steps in a row; start again under another run.name with a lower optim.lr"
            )
        if self.rank == 0:
            log.warning(
                "step %d: the loss or its gradient is not finite (%s), %d in a row of at most %d",
                self.run.step,
                listed,
                self._num_not_finite,
                self.training.max_skipped,
            )

    def _is_evaluation_due(self) -> bool:
        every, step = self.training.eval_every, self.run.step
        return step >= self.last_step or bool(every and step and step % every == 0)

    def _evaluation_is_missing(self, evaluation: Evaluation) -> bool:
        """Whether the step at which the run was resumed still has to be evaluated on this data."""
        done = [
            record
            for record in read_metrics(self.run.folder, group="eval")
            if record["step"] == self.run.step and record.get("data") == evaluation.fingerprint
        ]
        # Rank 0 decides for all: it writes the file.
        missing: bool = broadcast_object(self._is_evaluation_due() and not done)
        return missing

    def _record_evaluation(self, evaluation: Evaluation, metrics: Metrics) -> None:
        data = {"data": evaluation.fingerprint} | ({"split": evaluation.split} if evaluation.split else {})
        self.run.metrics.write({"step": self.run.step, **data, **metrics}, group="eval")
        if self.rank == 0:
            shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
            log.info("held-out data at step %d  %s", self.run.step, shown)


class _EvaluationGuard:
    """Yields evaluation batches until a rank is asked to stop; the wait for one is interrupted as in training."""

    def __init__(self, listener: StopListener, watch: Watch, step: int, device: torch.device):
        self.is_cut = False
        self._listener, self._watch, self._step, self._device = listener, watch, step, device

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; every rank takes the same number."""
        while True:
            batch = None
            self._watch.beat("evaluate", self._step)
            with suppress(StopRequested), self._listener.interruptible():
                batch = next(batches, None)
            self.is_cut = self._listener.agree(self._device) != StopRequest.NONE
            if self.is_cut or batch is None:
                return
            yield batch
