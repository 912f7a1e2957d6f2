"""The report of the ablation: tables with their spread, paired differences, and a picture of the gates.

Runs of one seed have the same batches and initial values, so variants are compared within a seed: the differences to
the reference have a mean and, from their spread, a 95 % interval by Student's t. With the few seeds of an ablation that
interval is wide; a difference whose interval includes zero shows nothing either way.

Source: Student's t for paired samples; its quantiles from any statistical table.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, mode, stdev
from typing import Any, NamedTuple

from benchmarks.report import write_report
from unimo3.gate_map import draw_maps

Result = dict[str, Any]

REFERENCE = "in_layer"
# Relative difference to the reference's parameters up to which a variant is of equal size.
MOST_SIZE_DIFFERENCE = 0.02
# Two-sided 95 % quantiles for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(T_QUANTILES) + 1
PRETRAINING = {
    "loss_mlm": "MLM loss",
    "accuracy_mlm": "MLM accuracy",
    "loss_itm": "ITM loss",
    "accuracy_itm": "ITM accuracy",
    "loss_itc": "ITC loss",
}
VQA = {"vqa_overall": "overall", "vqa_fine": "fine", "vqa_object": "object", "vqa_scene": "scene"}


class Difference(NamedTuple):
    """Of a variant to the reference: the mean over seeds and half the width of its 95 % interval, nan for one seed."""

    mean: float
    half_width: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return abs(self.mean) > self.half_width


def paired_difference(differences: Sequence[float]) -> Difference:
    """Mean and 95 % interval of one difference a seed, of which there are at most `MOST_SEEDS`."""
    if len(differences) < 2:
        return Difference(mean(differences), math.nan)
    error = stdev(differences) / math.sqrt(len(differences))
    return Difference(mean(differences), T_QUANTILES[len(differences) - 2] * error)


def paired_differences(results: Sequence[Result], variant: str, reference: str, metric: str) -> list[float]:
    """A metric of a variant minus another's, for each seed in ascending order."""
    ours, theirs = _by_seed(results, variant), _by_seed(results, reference)
    return [ours[seed]["metrics"][metric] - theirs[seed]["metrics"][metric] for seed in sorted(ours)]


def write_ablation(path: Path, results: Sequence[Result], blind: dict[str, float], is_quick: bool) -> None:
    """Write the report, its metrics as lines of JSON, and the picture of the gates, all by the report's name.

    Args:
        path: of the report, ``.md``.
        results: of every variant with every seed, alike in their settings.
        blind: VQA accuracy of the best guess from the question alone, by granularity.
        is_quick: marks the report as too short to compare.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    picture = path.with_name(f"{path.stem}_gates.png")
    gated = draw_gates(picture, results)
    seeds = sorted({result["seed"] for result in results})
    settings = results[0]["settings"]
    listed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    quick = "**A quick run: it shows that the ablation works, its runs are too short to compare.**\n\n"
    commits = ", ".join(sorted({result["machine"]["commit"] for result in results}))
    spread = "mean ± standard deviation over seeds" if len(seeds) > 1 else "one seed, so no spread"
    parts = [
        (quick if is_quick else "")
        + "The variants differ in what a fusion layer reads of the other modality; data, batches, steps and the "
        "initial values of shared parameters are equal for each seed. All metrics are of held-out data; cells contain "
        f"{spread}.\n\nSeeds: {', '.join(map(str, seeds))}. Settings: {listed}. Runs made at: {commits}.",
        f"## Pretraining\n\n{_table(results, PRETRAINING)}",
        f"## VQA accuracy after fine-tuning\n\n{_table(results, VQA, _blind_row(blind))}\n\n{_winner(results)}",
        *_difference_parts(results, len(seeds)),
        f"## Size and time\n\n{_cost_table(results)}",
    ]
    if gated:
        parts.append(
            f"## Gates\n\n![Gates of the levels]({picture.name})\n\nGate of each level in each layer after "
            "pretraining, mean over held-out tokens, heads and seeds. The last level of a row is the layer's partner; "
            f"it starts at {_initial_gates(results)} and the others split the rest. t1 and above are tower layers, 0 "
            f"and above states of the fusion encoder. {path.stem}.jsonl contains every seed's."
        )
    write_report(path, "Does cross-layer interaction help?", "\n\n".join(parts))


def draw_gates(path: Path, results: Sequence[Result]) -> bool:
    """Draw each gated variant's gates, layer by level, a map for each stream; False and no file if none has gates."""
    variants = [name for name in _variants(results) if _by_seed(results, name)[_first_seed(results)]["gates"]["text"]]
    if not variants:
        path.unlink(missing_ok=True)
        return False
    streams = {"text": "text reads image", "image": "image reads text"}
    grid = [
        [(f"{name}: {title}", _mean_gates(results, name, stream)) for stream, title in streams.items()]
        for name in variants
    ]
    draw_maps("gates of the variants", grid).save(path)
    return True


def _mean_gates(results: Sequence[Result], variant: str, stream: str) -> list[list[float]]:
    gates = [result["gates"][stream] for result in _by_seed(results, variant).values()]
    return [[mean(values) for values in zip(*rows, strict=True)] for rows in zip(*gates, strict=True)]


def _table(results: Sequence[Result], metrics: dict[str, str], *extra_rows: list[str]) -> str:
    rows = [
        [name]
        + [_spread(result["metrics"][metric] for result in _by_seed(results, name).values()) for metric in metrics]
        for name in _variants(results)
    ]
    return _markdown(["", *metrics.values()], [*rows, *extra_rows])


def _winner(results: Sequence[Result]) -> str:
    """The variants of equal size with the best task metric, the first of which the project's defaults follow."""
    size = _by_seed(results, REFERENCE)[_first_seed(results)]["parameters"]
    means = {
        name: mean(result["metrics"]["vqa_overall"] for result in runs.values())
        for name in _variants(results)
        if (runs := _by_seed(results, name))[_first_seed(results)]["parameters"] <= size * (1 + MOST_SIZE_DIFFERENCE)
    }
    best = sorted(means, key=lambda name: means[name], reverse=True)[:2]
    listed = ", then ".join(f"{name} ({means[name]:.4f})" for name in best)
    return f"Highest mean of VQA overall among variants of equal size: {listed}."


def _blind_row(blind: dict[str, float]) -> list[str]:
    return ["best guess without the image", *(f"{blind[metric.removeprefix('vqa_')]:.4f}" for metric in VQA)]


def _initial_gates(results: Sequence[Result]) -> str:
    """The partner's gate before training, of each gated variant."""
    gates = {result["variant"]: result["model"]["gate_init"] for result in results if result["gates"]["text"]}
    common = mode(gates.values())
    return ", ".join([f"{common}", *(f"{gate} in {name}" for name, gate in gates.items() if gate != common)])


def _difference_parts(results: Sequence[Result], num_seeds: int) -> list[str]:
    """Differences of all variants to the reference, then of those that build on the bridges to the bridges alone."""
    names = _variants(results)
    compared = {REFERENCE: [name for name in names if name != REFERENCE]}
    compared["bridge"] = [name for name in names if "bridge" in names and name.startswith("cross_layer_bridge")]
    return [
        f"## Paired differences to {reference}\n\n{_difference_text(results, reference, others, num_seeds)}"
        for reference, others in compared.items()
        if others
    ]


def _difference_text(results: Sequence[Result], reference: str, others: Sequence[str], num_seeds: int) -> str:
    rows, clear = [], []
    for metric, label in (PRETRAINING | {name: f"VQA {label}" for name, label in VQA.items()}).items():
        for name in others:
            each = paired_differences(results, name, reference, metric)
            paired = paired_difference(each)
            interval = "" if math.isnan(paired.half_width) else f" ± {paired.half_width:.4f}"
            rows.append([label, name, f"{paired.mean:+.4f}{interval}", ", ".join(f"{value:+.4f}" for value in each)])
            if paired.excludes_zero:
                clear.append(f"{name} in {label} ({paired.mean:+.4f})")
    table = _markdown(["metric", "variant", "mean, 95 % interval", "each seed"], rows)
    if num_seeds < 2:
        return f"{table}\n\nOne seed has no spread: significance is unknown."
    return (
        f"{table}\n\nThe interval is that of a paired t test with {num_seeds - 1} degrees of freedom. Of {len(rows)} "
        f"differences {len(clear)} have an interval that excludes zero{': ' if clear else ''}{'; '.join(clear)}. If no "
        f"variant differed at all, about {0.05 * len(rows):.1f} would do so by chance, as none is corrected for the "
        "number of comparisons. Lower losses and higher accuracies are better."
    )


def _cost_table(results: Sequence[Result]) -> str:
    rows = []
    size = _by_seed(results, REFERENCE)[_first_seed(results)]["parameters"]
    for name in _variants(results):
        runs = list(_by_seed(results, name).values())
        parameters = runs[0]["parameters"]
        times = [_spread(run[stage]["step_s"] for run in runs) for stage in ("pretraining", "vqa")]
        rows.append([name, f"{parameters:,}", f"{parameters / size - 1:+.2%}", *times])
    header = ["", "parameters", f"compared with {REFERENCE}", "pretraining, s a step", "VQA, s a step"]
    return (
        f"{_markdown(header, rows)}\n\nSeconds are each run's median, one thread, without reading data, while other "
        "runs used the machine's other cores: a rough comparison."
    )


def _spread(values: Iterable[float]) -> str:
    listed = list(values)
    return f"{mean(listed):.4f}" + (f" ± {stdev(listed):.4f}" if len(listed) > 1 else "")


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _variants(results: Sequence[Result]) -> list[str]:
    """In the order of the runs."""
    return list(dict.fromkeys(result["variant"] for result in results))


def _by_seed(results: Sequence[Result], variant: str) -> dict[int, Result]:
    return {result["seed"]: result for result in results if result["variant"] == variant}


def _first_seed(results: Sequence[Result]) -> int:
    seed: int = results[0]["seed"]
    return seed
