"""The training loop: batch, losses, backward, step, metrics, save, evaluation.

Source: torchtitan's trainer.py and lingua's apps/main/train.py for the structure.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch

from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.save import Saver
from unimo3.distributed import broadcast_object, sum_over_ranks
from unimo3.engine import Engine
from unimo3.errors import DivergedError, Interrupted
from unimo3.objectives.by_source import means_by_source
from unimo3.training.args import OptimArgs, TrainingArgs
from unimo3.training.engine import gradient_norm, step_was_skipped
from unimo3.training.evaluation import Evaluation, StopGuard, to_device
from unimo3.training.lr_schedule import lr_scale, set_lr
from unimo3.training.metrics import Metrics, StepResult, forget_peak_memory, read_metrics, step_metrics
from unimo3.training.parts import check_trains
from unimo3.training.preempt import STOP_FILE, StopRequest, StopRequested
from unimo3.training.process import RankProcess
from unimo3.training.profiling import StepProfiler
from unimo3.training.progress import StepProgress
from unimo3.training.run import Run
from unimo3.training.throughput import Throughput

log = logging.getLogger(__name__)

Batch = dict[str, Any]
PrepareStep = Callable[[Iterable[Batch]], list[Batch]]


class TrainerSettings(Protocol):
    """The groups of a program's settings that its training loop reads."""

    @property
    def training(self) -> TrainingArgs: ...
    @property
    def optim(self) -> OptimArgs: ...
    @property
    def checkpoint(self) -> CheckpointArgs: ...


class _RankCounts(NamedTuple):
    """Number of ranks with each request or problem, and of bad samples; every rank acts on the sums."""

    requeue: float
    stop: float
    profile: float
    save_failed: float
    num_bad: float


class Trainer:
    """Trains from `run.step` to the end, or until asked to stop.

    Args:
        process: this process, which has joined the other ranks.
        run: the run's folder, metrics and state; its `step` counts the optimizer steps done.
        engine: the DeepSpeed engine over a task: batch -> dict with ``loss``.
        batches: the micro-batches of each optimizer step, from `run.step` on. None: do not train;
            evaluate the run's current step, again if needed.
        evaluation: metrics on held-out data, at the end and every `training.eval_every` steps.
        throughput: counts operations for the metrics; rank 0 has it, on GPUs.
        prepare_step: reads a step's micro-batches before the first of them is computed, and returns what each gets in
            addition. None: nothing is prepared.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        process: RankProcess,
        run: Run,
        engine: Engine,
        batches: Iterable[list[Batch]] | None,
        evaluation: Evaluation | None,
        throughput: Throughput | None = None,
        prepare_step: PrepareStep | None = None,
    ):
        self.training_args, self.optim_args = settings.training, settings.optim
        self.checkpoint_args = settings.checkpoint
        self.world, self.listener, self.watch = process
        self.run, self.engine, self.evaluation, self.throughput = run, engine, evaluation, throughput
        self.prepare_step = prepare_step
        self.batches: Iterator[list[Batch]] = iter(() if batches is None else batches)
        self.only_evaluates = batches is None
        self.saver = Saver(engine, run.folder, self.checkpoint_args)
        self.progress = StepProgress(self.training_args.steps, run.step, self.training_args.log_every, self.world.rank)
        self.profiler = StepProfiler(run.folder, self.world.rank)
        self.first_step = run.step
        self.last_step = min(self.training_args.steps, self.training_args.stop_after or self.training_args.steps)
        if self.only_evaluates:
            self.last_step = run.step
        self.request = StopRequest.NONE
        self._pending_result: StepResult | None = None
        self._num_consecutive_nonfinite = 0
        self._evaluation_stopped = False
        self._data_s = 0.0
        self._step_started_s = time.perf_counter()

    def train(self) -> None:
        """Train, evaluate and save.

        Raises:
            Interrupted: a stop signal or the file ``requeue`` came on any rank; a checkpoint has been saved.
            CheckpointError: a save failed, at this step or in the background of steps before.
            DataError: too many samples could not be used.
            DivergedError: losses or gradients remain non-finite; no such state has been saved.
        """
        self.listener.watch_folder(self.run.folder)
        if self.evaluation is not None and self.evaluation.best is not None:
            # An earlier start may have stopped early.
            self.last_step = self.evaluation.best.last_step(self.run, self.last_step)
        if self.evaluation is not None and (self.only_evaluates or self._needs_evaluation_at_start(self.evaluation)):
            self.evaluate()
        self.engine.train()
        self._step_started_s = time.perf_counter()
        while (micro_batches := self.next_batches()) is not None:
            with self.profiler.step(self.run.step + 1):
                self.train_step(micro_batches)
            is_save_due = self.run.step == self.last_step or self.run.step % self.checkpoint_args.every_steps == 0
            is_evaluation_due = self._is_evaluation_due()
            if is_save_due or is_evaluation_due:
                self.sync_and_log()  # raises DivergedError first, so a diverged step is not saved
            if is_save_due:
                self.save()
            if is_evaluation_due:
                self.evaluate()
            if is_save_due or is_evaluation_due:
                self._step_started_s = time.perf_counter()
        self.finish()

    def next_batches(self) -> list[Batch] | None:
        """Wait for data, then synchronize.

        Returns:
            The micro-batches; None on every rank at the end or when any rank is asked to stop.
        """
        self.watch.beat("data", self.run.step)
        micro_batches = None
        wait_started = time.perf_counter()
        if self.request == StopRequest.NONE and self.run.step < self.last_step:
            with suppress(StopRequested), self.listener.interruptible():
                micro_batches = next(self.batches)
        self._data_s = time.perf_counter() - wait_started
        self.watch.beat("wait", self.run.step)
        # After the wait for data, so that no rank begins a step that another one skips.
        self.sync_and_log()
        return micro_batches if self.request == StopRequest.NONE else None

    def train_step(self, micro_batches: list[Batch]) -> None:
        """Take one optimizer step."""
        run, engine = self.run, self.engine
        optim = self.optim_args
        scale = lr_scale(run.step, self.training_args.steps, optim.warmup_ratio, optim.schedule, optim.decay_ratio)
        set_lr(engine.optimizer, scale)
        means = self._accumulate(micro_batches)
        run.step += 1
        run.record_samples(micro_batches)
        was_skipped = step_was_skipped(engine)
        run.num_skipped += was_skipped
        now = time.perf_counter()
        self._pending_result = StepResult(
            means={name: value.reshape(()) for name, value in means.items() if value.numel() == 1},
            # only gates have more than one element
            gates={name: value for name, value in means.items() if value.numel() > 1},
            num_bad=sum(int(batch["num_replaced"]) for batch in micro_batches),
            lr=optim.lr * scale,
            raw_norm=gradient_norm(engine),
            was_skipped=was_skipped,
            step_s=now - self._step_started_s,
            data_s=self._data_s,
        )
        self._step_started_s = now

    def _accumulate(self, micro_batches: list[Batch]) -> dict[str, torch.Tensor]:
        """Run each micro-batch; the engine takes its step after the last one. Returns the means of what they report."""
        sums: dict[str, torch.Tensor] = {}
        prepared: list[Batch] = [{}] * len(micro_batches)
        if self.prepare_step is not None:
            prepared = self.prepare_step(self._on_device(micro_batches))
        for batch, more in zip(self._on_device(micro_batches), prepared, strict=True):
            report = self.engine(batch | more)
            check_trains(report["loss"], self.optim_args.freeze)
            self.engine.backward(report["loss"])
            self.engine.step()
            for name, value in report.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float()
        return {name: value / len(micro_batches) for name, value in sorted(sums.items())}

    def _on_device(self, micro_batches: list[Batch]) -> Iterator[Batch]:
        """Move each micro-batch when it is computed, and report progress."""
        for batch in micro_batches:
            # The first step of a start compiles, so phase 'start' has a longer time limit.
            self.watch.beat("compute" if self.run.step > self.first_step else "start", self.run.step)
            yield to_device(batch, self.engine.device)

    def sync_and_log(self) -> None:
        """Agree on requests, log the last step and check it, in one small all-reduce; every rank calls it.

        Raises:
            DataError, DivergedError: on every rank; of the last step.
            CheckpointError: on every rank; of a save in the background.
        """
        step, self._pending_result = self._pending_result, None
        # otherwise the request stays pending
        can_trace = not self.profiler.is_active and self.run.step < self.last_step
        wants_profile = can_trace and self.listener.wants_profile
        means, agreed = self._agree(step, wants_profile)
        self.request = max(self.request, StopRequest.of_counts(agreed.requeue, agreed.stop))
        if agreed.profile:
            self.profiler.request()
        if wants_profile:
            self.listener.prepare_profile(self.run.step + 1)
        if step:
            self.run.count_bad_samples(int(agreed.num_bad))
            self.log_step(step, means)
            self._check_finite(step, means["loss"], {**means_by_source(means), "grad_norm": step.grad_norm})
        self.run.record_saves(self.saver.take_finished())
        if agreed.save_failed:
            self.saver.wait()  # raises on every rank, unless checkpoint.on_save_error is warn

    def _agree(self, step: StepResult | None, wants_profile: bool) -> tuple[dict[str, float], _RankCounts]:
        """Means over all ranks of a step's scalars, and what the ranks agree on."""
        num_bad = step.num_bad if step else 0
        flags = _RankCounts(*self.listener.counts(), wants_profile, self.saver.has_failed, num_bad)
        vector = torch.tensor(flags, dtype=torch.float32, device=self.engine.device)
        scalars = step.means if step else {}
        if scalars:
            vector = torch.cat([torch.stack(list(scalars.values())), vector])
        sums = sum_over_ranks(vector).tolist()
        # `sums` also has the counts.
        means = {name: value / self.world.size for name, value in zip(scalars, sums, strict=False)}
        return means, _RankCounts(*sums[len(scalars) :])

    def log_step(self, step: StepResult, means: dict[str, float]) -> None:
        """Write the metrics of the step just taken, and show them on rank 0."""
        run = self.run
        counts = {"bad_samples": run.num_bad_samples, "skipped_steps": run.num_skipped}
        metrics = step_metrics(run.step, self.training_args.global_batch, step, means, self.throughput, counts)
        gates: Metrics = {}
        if self.progress.is_due(run.step):  # gates are large; memory is the peak since the last line
            gates = {name: value.tolist() for name, value in step.gates.items()}
            forget_peak_memory()
        run.metrics.write(metrics | run.data_metrics() | gates)
        self.progress.show(metrics)

    def save(self) -> None:
        """Save a checkpoint of the step just taken."""
        self.watch.beat("save", self.run.step)
        self.saver.save(self.run.state(), is_last=self.run.step == self.last_step)

    def evaluate(self) -> None:
        """Evaluate on held-out data, record the metrics, and save the checkpoint if it is the best."""
        evaluation = self.evaluation
        assert evaluation is not None, "no evaluation is due without held-out data"
        guard = self._guard()
        metrics = evaluation.metrics(self.run.step, guard)
        self._evaluation_stopped = guard.is_stopped  # the next start evaluates again
        if metrics is not None:
            self._record_evaluation(evaluation, metrics)
            if evaluation.pictures is not None:
                self.run.metrics.write_pictures(self.run.step, evaluation.pictures(self._guard()))
            if evaluation.best is not None:
                evaluation.best.consider(self.run, metrics, lambda: self._ensure_saved(is_last=False))
                self.last_step = evaluation.best.last_step(self.run, self.last_step)
        self.engine.train()

    def _guard(self) -> StopGuard:
        return StopGuard(self.listener, self.watch, self.run.step, self.engine.device)

    def finish(self) -> None:
        """Save what is not saved yet; log how the run ended, or raise that it is to be requeued.

        Raises:
            Interrupted: the run was asked to stop before its end.
        """
        self.progress.close()
        self.profiler.close()
        self._ensure_saved()
        self.run.record_saves(self.saver.take_finished())
        self.watch.close()
        is_complete = self.run.step >= self.last_step and not self._evaluation_stopped
        if self.request == StopRequest.REQUEUE and not is_complete:
            self.listener.done()
            raise Interrupted(self._interrupted_message())
        stopped_by_file = not is_complete and self.request == StopRequest.STOP
        if self.world.rank == 0:
            log.info("%s", self._stopped_message() if stopped_by_file else self._done_message())

    def _interrupted_message(self) -> str:
        """Why the run is to be started again, and how far it came."""
        asked = f"asked to stop ({self.listener.name or 'by another rank'})"
        if self.only_evaluates:
            return (
                f"{asked} during the evaluation {self._progress_message()}; its results are not saved; start the "
                "same command to repeat it"
            )
        return f"{asked}; {self._progress_message()}; start the same command to continue"

    def _stopped_message(self) -> str:
        """How far a run came that the file ``stop`` has ended."""
        what = "the evaluation is not finished" if self._evaluation_stopped else self._progress_message()
        file = self.run.folder / STOP_FILE
        return f"stopped by the file {file}; {what}; to continue, type: rm {file}"

    def _done_message(self) -> str:
        """Where the results of a complete run are."""
        run = self.run
        if self.only_evaluates:
            return f"done: evaluated step {run.step} of {run.folder}"
        return f"done: step {run.step} of {self.training_args.steps}; checkpoints and metrics are in {run.folder}"

    def _progress_message(self) -> str:
        run = self.run
        if self.only_evaluates:
            return f"of step {run.step} in {run.folder}"
        if run.step == 0:
            return "before the first step, so nothing is lost"
        return f"step {run.step} of {self.training_args.steps} is saved in {run.folder}"

    def _ensure_saved(self, is_last: bool = True) -> bool:
        self.watch.beat("save", self.run.step)
        # The step at which the run was resumed is saved already.
        return self.run.step == self.first_step or self.saver.ensure(self.run.state(), is_last)

    def _check_finite(self, step: StepResult, loss: float, logged: Metrics) -> None:
        """Count steps in a row whose loss or gradient is not finite.

        Under fp16 only a non-finite loss counts: loss scaling skips overflowing gradients.
        """
        is_finite = math.isfinite(loss) and (
            self.engine.fp16_enabled() or (math.isfinite(step.grad_norm) and not step.was_skipped)
        )
        self._num_consecutive_nonfinite = 0 if is_finite else self._num_consecutive_nonfinite + 1
        if is_finite:
            return
        listed = ", ".join(f"{name} {value:.4g}" for name, value in logged.items() if value is not None)
        if self._num_consecutive_nonfinite > self.training_args.max_skipped:
            raise DivergedError(
                f"step {self.run.step}: the loss or its gradient is not finite ({listed}), "
                f"{self._num_consecutive_nonfinite} steps in a row; start again under another run.name with a lower "
                "optim.lr"
            )
        if self.world.rank == 0:
            log.warning(
                "step %d: the loss or its gradient is not finite (%s), %d in a row (limit %d)",
                self.run.step,
                listed,
                self._num_consecutive_nonfinite,
                self.training_args.max_skipped,
            )

    def _is_evaluation_due(self) -> bool:
        eval_every, step = self.training_args.eval_every, self.run.step
        is_due = step >= self.last_step or bool(eval_every and step and step % eval_every == 0)
        return self.evaluation is not None and is_due

    def _needs_evaluation_at_start(self, evaluation: Evaluation) -> bool:
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
        if self.world.rank == 0:
            shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
            log.info("held-out data at step %d  %s", self.run.step, shown)
