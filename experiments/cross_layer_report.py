"""The report of the experiment on cross-layer interaction: tests of the runs, what the gates do, and the pilot.

Variants are compared within a seed. `cross_layer_design.md` defines what counts as support.

Source: see `paired`.
"""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from benchmarks.report import write_report
from experiments.cross_layer_plan import (
    ALPHA,
    COMPARED,
    DATA_SETS,
    EFFECT,
    POWER,
    SEEDS,
    Comparison,
    Line,
    comparisons,
    read_lines,
)
from experiments.paired import Paired, holm, num_pairs_for, paired
from unimo3.errors import DataError
from unimo3.gate_map import draw_maps
from unimo3.model.args import ModelArgs

DEFAULT_GATE_INIT = ModelArgs().gate_init
SHOWN = ("vqa_", "tr_", "ir_", "recall_", "auc")
"""How the names of the metrics begin that are listed."""


def write_cross_layer(results: Path) -> None:
    """Write ``NAME.md`` and ``NAME_gates.png`` next to the lines of ``NAME.jsonl``.

    Raises:
        DataError: there are no lines, or runs that do not compare.
    """
    lines = read_lines(results)
    if not lines:
        raise DataError(f"{results}: has no runs; do them with `python -m experiments.cross_layer run`")
    runs = [line for line in lines if line["stage"] == "run"]
    check(runs, results)
    picture = results.with_name(f"{results.stem}_gates.png")
    parts = ["`experiments/cross_layer_design.md` has the hypotheses, the tests and what counts as support."]
    missing = num_missing(runs)
    parts.append(f"**{missing} runs are missing.** Nothing is tested before all are done." if missing else _tests(runs))
    if runs:
        complete = [line for line in runs if "diverged" not in line]
        parts.append(_diverged_part([line for line in runs if "diverged" in line]))
        parts += [_metrics_part(complete), _forced_part(complete), _cost_part(complete)]
        parts.append(_gates_part(complete, picture))
    else:
        picture.unlink(missing_ok=True)
    parts.append(_pilot_part([line for line in lines if line["stage"] == "pilot"]))
    title = "Cross-layer interaction, a designed experiment"
    write_report(results.with_suffix(".md"), title, "\n\n".join(filter(None, parts)))


def check(runs: Sequence[Line], results: Path) -> None:
    """Refuse what does not compare.

    Raises:
        DataError: runs on a data set have different settings or data, or a run is there twice.
    """
    for data_set in DATA_SETS:
        ours = _of(runs, data_set.name)
        for name in ("settings", "data"):
            if len({json.dumps(line[name], sort_keys=True) for line in ours}) > 1:
                raise DataError(
                    f"{results}: runs on {data_set.name} differ in their {name}; remove the lines of one kind, or do "
                    "the runs with another file of --results"
                )
        keys = [(line["variant"], line["seed"]) for line in ours]
        for variant, seed in {key for key in keys if keys.count(key) > 1}:
            raise DataError(f"{results}: {data_set.name} {variant} seed {seed} is there twice; remove a line")


def num_missing(runs: Sequence[Line]) -> int:
    """How many of the designed runs are not among these."""
    done = {(line["data_set"], line["variant"], line["seed"]) for line in runs}
    return sum(len({*product([name], COMPARED, seeds)} - done) for name, seeds in SEEDS.items())


def differences(lines: Sequence[Line], comparison: Comparison, metric: str) -> list[float]:
    """One for each seed that both variants have, in the order of the seeds."""
    ours, theirs = (
        {line["seed"]: line["metrics"][metric] for line in _of(lines, comparison.data_set, variant)}
        for variant in (comparison.variant, comparison.reference)
    )
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def compare_variants(runs: Sequence[Line]) -> list[tuple[Comparison, int, Paired, float]]:
    """Each comparison with two seeds or more: how many it has, its test, and the p-value corrected by Holm."""
    primary = {data_set.name: data_set.primary for data_set in DATA_SETS}
    each = {one: differences(runs, one, primary[one.data_set]) for one in comparisons(_variants(runs))}
    results = {one: paired(values) for one, values in each.items() if len(values) > 1}
    corrected = holm({str(one): test.p for one, test in results.items()})
    return [(one, len(each[one]), test, corrected[str(one)]) for one, test in results.items()]


def _tests(runs: Sequence[Line]) -> str:
    """Of the designed runs; further ones are only shown."""
    designed = [line for line in runs if line["seed"] in SEEDS[line["data_set"]] and line["variant"] in COMPARED]
    rows = []
    for one, num_seeds, test, corrected in compare_variants(designed):
        effect, p = f"{test.effect:+.2f}", f"{test.p:.4f}"
        rows.append([*_interval(one, test), str(num_seeds), effect, p, f"{corrected:.4f}"])
    header = ["data set", "difference", "mean", "95 % interval"]
    choice = []
    for data_set in DATA_SETS:
        one = Comparison(data_set.name, "cross_layer_bridge_even", "cross_layer_bridge")
        choice.append(_interval(one, paired(differences(designed, one, data_set.primary))))
    commits = ", ".join(sorted({line["machine"]["commit"] for line in designed}))
    return (
        f"## Comparisons\n\n{_markdown([*header, 'seeds', 'effect size', 'p', 'p, corrected'], rows)}\n\nPaired t "
        "tests of the primary metrics, two-sided. The last column is corrected by Holm's method for the "
        f"{len(rows)} rows of the table; the intervals are not corrected. The effect size is the mean in standard "
        f"deviations of the differences. Runs made at: {commits}.\n\n{_markdown(header, choice)}\n\nThese intervals "
        "decide the default of `model.gate_init`. They are no tests of the hypotheses."
    )


def _interval(one: Comparison, test: Paired) -> list[str]:
    low, high = test.mean - test.half_width, test.mean + test.half_width
    return [one.data_set, f"{one.variant} - {one.reference}", f"{test.mean:+.4f}", f"{low:+.4f} to {high:+.4f}"]


def _diverged_part(runs: Sequence[Line]) -> str:
    if not runs:
        return ""
    listed = [f"- {line['diverged']}. It counts as {next(iter(line['metrics'].values())):.4f}." for line in runs]
    ends = "The tests include them, as the best guess without a picture. The tables below do not."
    return "\n".join(["## Diverged runs", "", *listed, "", ends])


def _metrics_part(runs: Sequence[Line]) -> str:
    parts = ["## Metrics", "Mean ± standard deviation over seeds. Only the first column of a table is tested."]
    for data_set in DATA_SETS:
        ours = _of(runs, data_set.name)
        if not ours:
            continue
        others = [name for name in ours[0]["metrics"] if name.startswith(SHOWN) and name != data_set.primary]
        columns = [data_set.primary, *others]
        rows = []
        for variant in _variants(ours):
            metrics = [line["metrics"] for line in _of(ours, data_set.name, variant)]
            rows.append([variant, *(_spread(each[name] for each in metrics) for name in columns)])
        parts.append(f"### {data_set.title}\n\n{_markdown(['', *columns], rows)}")
    return "\n\n".join(parts)


def _forced_part(runs: Sequence[Line]) -> str:
    rows = []
    for data_set in DATA_SETS:
        for variant in _variants(runs):
            gated = [line for line in _of(runs, data_set.name, variant) if line["forced"]]
            for forcing in gated[0]["forced"] if gated else ():
                test = paired([line["forced"][forcing] - line["metrics"][data_set.primary] for line in gated])
                half = "" if math.isnan(test.half_width) else f" ± {test.half_width:.4f}"
                rows.append([data_set.name, variant, forcing, f"{test.mean:+.4f}{half}"])
    if not rows:
        return ""
    table = _markdown(["data set", "variant", "all gates on", "difference in the primary metric, 95 % interval"], rows)
    return (
        f"## Forced gates\n\n{table}\n\nThe trained models with all gates forced to one level, at inference. A layer "
        "that does not see the level reads its partner. The tests above do not include these differences."
    )


def _cost_part(runs: Sequence[Line]) -> str:
    rows = []
    for data_set in DATA_SETS:
        for variant in _variants(_of(runs, data_set.name)):
            ours = _of(runs, data_set.name, variant)
            cells = [data_set.name, variant, f"{ours[0]['parameters']:,}"]
            for stage in ("pretraining", "tuning"):
                times = [line["training"][stage]["step_s"] for line in ours if stage in line["training"]]
                cells.append(_spread(times) if times else "")
            rows.append([*cells, _spread((line["seconds"] for line in ours), digits=0)])
    header = ["data set", "variant", "parameters", "pretraining, s a step", "tuning, s a step", "s a run"]
    return f"## Size and time\n\n{_markdown(header, rows)}\n\nSeconds of one thread, while other runs used other cores."


def _gates_part(runs: Sequence[Line], picture: Path) -> str:
    grid = []
    for data_set in DATA_SETS:
        for variant in _variants(runs):
            gated = [line["gates"] for line in _of(runs, data_set.name, variant) if line["gates"]]
            for group in gated[0] if gated else ():
                if group != "overall":
                    streams = (("text", "text reads image"), ("image", "image reads text"))
                    maps = {title: _mean_map([gates[group][stream] for gates in gated]) for stream, title in streams}
                    grid.append([(f"{variant}, {group}: {title}", one) for title, one in maps.items()])
    if not grid:
        picture.unlink(missing_ok=True)
        return ""
    draw_maps("gates by the kind of text", grid).save(picture)
    return (
        f"## Gates\n\n![Gates of the levels]({picture.name})\n\nGate of each level in each layer after training: "
        "the mean over a sample's tokens and over heads, then over held-out samples and seeds. Fine, object and scene "
        "are the granularities of toy VQA's questions. Pairs are pictures with one of their captions. The last level "
        "of a row is the layer's partner.\n\n"
        f"{_partner_part(runs)}"
    )


def _partner_part(lines: Sequence[Line]) -> str:
    """How far the gates' weight of the partner is from its start, and how much it differs between tokens and heads."""
    rows = []
    for data_set in DATA_SETS:
        for variant in _variants(lines):
            gated = [line for line in _of(lines, data_set.name, variant) if line.get("gate_spreads")]
            for stream in gated[0]["gate_spreads"] if gated else ():
                layers = range(1, len(gated[0]["gate_spreads"][stream]))
                cells = [
                    f"{mean(line['gates']['overall'][stream][layer][-1] for line in gated):.3f} "
                    f"({mean(line['gate_spreads'][stream][layer] for line in gated):.3f})"
                    for layer in layers
                ]
                start = gated[0]["interaction"].get("gate_init", DEFAULT_GATE_INIT)
                rows.append([data_set.name, variant, stream, str(len(gated)), f"{start:.3f}", " ".join(cells)])
    if not rows:
        return ""
    header = ["data set", "variant", "stream", "seeds", "start", "weight of the partner, layers 2 and up"]
    return (
        f"{_markdown(header, rows)}\n\nMean weight of the partner after training, over seeds, with its standard "
        "deviation over tokens and heads in brackets."
    )


def _pilot_part(pilot: Sequence[Line]) -> str:
    """Spread of the pilot's differences, and the number of seeds that this spread needs."""
    rows, values = [], []
    num_tests = len(comparisons(COMPARED))
    for data_set in DATA_SETS:
        ours = _of(pilot, data_set.name)
        for variant in _variants(ours):
            metrics = [line["metrics"][data_set.primary] for line in _of(ours, data_set.name, variant)]
            values.append([data_set.name, variant, str(len(metrics)), _spread(metrics)])
        for one in comparisons(_variants(ours)):
            each = differences(ours, one, data_set.primary)
            if len(each) > 1 and (spread := stdev(each)) > 0:
                seeds = [num_pairs_for(effect, spread, ALPHA / num_tests, POWER) for effect in (EFFECT, 2 * EFFECT)]
                name = f"{one.variant} - {one.reference}"
                rows.append([data_set.name, name, f"{mean(each):+.4f}", f"{spread:.4f}", *map(str, seeds)])
    if not values:
        return ""
    table = _markdown(["data set", "variant", "seeds", "primary metric"], values)
    header = ["data set", "difference", "mean", "standard deviation", *(f"seeds for {n}" for n in (EFFECT, 2 * EFFECT))]
    needed = (
        f"\n\n{_markdown(header, rows)}\n\nThe last columns are the numbers of seeds with which a paired t test "
        f"finds a true difference of that size with {POWER:.0%} power at {ALPHA} / {num_tests}, if the standard "
        "deviation is that of the pilot."
    )
    gates = _partner_part(pilot)
    return f"## Pilot\n\n{table}{needed if rows else ''}" + (f"\n\n{gates}" if gates else "")


def _mean_map(maps: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """[runs][layers][levels] -> [layers][levels]."""
    return [[mean(values) for values in zip(*rows, strict=True)] for rows in zip(*maps, strict=True)]


def _of(lines: Sequence[Line], data_set: str, variant: str | None = None) -> list[Line]:
    return [line for line in lines if line["data_set"] == data_set and variant in (None, line["variant"])]


def _variants(lines: Sequence[Line]) -> list[str]:
    """In the order of the runs."""
    return list(dict.fromkeys(line["variant"] for line in lines))


def _spread(values: Iterable[float], digits: int = 4) -> str:
    listed = list(values)
    return f"{mean(listed):.{digits}f}" + (f" ± {stdev(listed):.{digits}f}" if len(listed) > 1 else "")


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
