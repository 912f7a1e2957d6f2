"""What a run shows of its steps: a progress bar on a terminal, else a line every few steps."""

import logging
import math

from tqdm import tqdm

from unimo3.training.metrics import Metrics

log = logging.getLogger(__name__)


class StepProgress:
    """Shows steps on rank 0; on other ranks nothing is shown.

    Args:
        num_steps: of the complete run.
        first_step: steps done before this start.
        log_every: steps between lines where the output is no terminal.
    """

    def __init__(self, num_steps: int, first_step: int, log_every: int, rank: int):
        self._num_steps, self._log_every, self._rank = num_steps, log_every, rank
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=None if rank == 0 else True)

    def is_due(self, step: int) -> bool:
        """Whether a line is logged of a step."""
        return step % self._log_every == 0 or step in (1, self._num_steps)

    def show(self, metrics: Metrics) -> None:
        """Show a step's metrics, see `step_metrics`."""
        step = metrics["step"]
        losses = {
            name: math.nan if value is None else value
            for name, value in metrics.items()
            if name.startswith("loss") and "/" not in name  # of all sources together
        }
        self._bar.update(1)
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
        if self._rank != 0 or not self.is_due(step):
            return
        if metrics.get("single_image_ratio"):
            log.warning(
                "step %d: in %.0f%% of the micro-steps all pairs have one image_id, and there are no negative pairs; "
                "raise training.micro_batch, or check image_id in the shards",
                step,
                100 * metrics["single_image_ratio"],
            )
        if self._bar.disable:
            log.info(
                "step %d/%d  %s  lr %.2e  %.1f pairs/s  %.0f s left",
                step,
                self._num_steps,
                " ".join(f"{name} {value:.4f}" for name, value in losses.items()),
                metrics["lr"],
                metrics["pairs_per_s"],
                (self._num_steps - step) * metrics["step_s"],
            )

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()
