"""One self-contained HTML file of a run: ``python -m slurm.status RUN --html out.html``.

Charts of losses, held-out metrics, speed, learning rate and gates over the steps, and a time line of starts, nodes and
checkpoints. The file loads nothing from elsewhere, so it can be copied from a cluster and opened anywhere.

Source: plotly's to_html.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm import history
from unimo3.atomic_write import replace_text
from unimo3.errors import ConfigError
from unimo3.gate_map import Gates, gates_by_layer, gates_of, level_names, mean_over_heads, num_tower_levels
from unimo3.json_lines import read_records

if TYPE_CHECKING:
    import plotly.graph_objects as go

Records = list[dict[str, Any]]

MAX_POINTS = 2000
"""Of a curve; longer runs show means of neighbouring steps."""
MAX_MAPS = 400
"""Columns of the chart of gates; of more maps every n-th is shown."""

_STYLE = (
    "body{font-family:sans-serif;max-width:1400px;margin:1em auto;padding:0 1em;color:#222}"
    "pre{background:#f6f6f6;padding:1em;overflow-x:auto}h2{margin:1em 0 0;font-size:1.1em}"
    "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(600px,1fr));gap:0 2em}section{min-width:0}"
)
_CONFIG = {"displaylogo": False, "responsive": True}
_CHECKPOINTS = "checkpoints"
_LEFT, _RUNNING = "cut off", "running"
_COLOURS = {
    "done": "#2ca02c",
    "requeue": "#1f77b4",
    "link": "#9edae5",
    "left": "#c7c7c7",
    "hold": "#d62728",
    "exclude": "#ff7f0e",
    _LEFT: "#7f7f7f",
    _RUNNING: "#17becf",
}


def write(path: Path, run: Path, screen: str, is_running: bool) -> None:
    """Replace a file by the page of a run.

    Args:
        screen: the run's state, as ``slurm.status`` prints it.
        is_running: whether a start without an end may be at work.

    Raises:
        ConfigError: the file cannot be written, or a later version wrote the run's metrics.
    """
    text = page(run, read_records(run / "metrics.jsonl"), history.read(run), screen, is_running)
    try:
        replace_text(path, text, errors="replace")
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written ({error.strerror}); name another file") from error


def page(run: Path, records: Records, attempts: Sequence[history.Attempt], screen: str, is_running: bool) -> str:
    """The page's HTML."""
    steps = [record for record in records if "group" not in record and _is_number(record.get("step"))]
    evaluations = [record for record in records if record.get("group") == "eval" and _is_number(record.get("step"))]
    sections: list[str] = []
    losses = _names(steps, "loss")
    for title, figure in (
        ("Starts, nodes and checkpoints", time_line(run, attempts, is_running)),
        ("Loss", curves(steps, [name for name in losses if "/" not in name])),
        ("Loss of each source", curves(steps, [name for name in losses if "/" in name])),
        ("Accuracy of the training batches", curves(steps, _names(steps, "accuracy"))),
        ("Held-out losses", held_out(evaluations, is_loss=True)),
        ("Held-out metrics", held_out(evaluations, is_loss=False)),
        ("Learning rate", curves(steps, ["lr"], from_zero=True)),
        ("Gradient norm", curves(steps, ["grad_norm"], from_zero=True)),
        ("Speed: pairs/s", curves(steps, ["pairs_per_s"], from_zero=True)),
        ("Seconds of a step, and of its wait for data", curves(steps, ["step_s", "data_s"], from_zero=True)),
        ("Operations of a GPU: MFU", curves(steps, ["mfu"], from_zero=True)),
        ("Peak memory: bytes", curves(steps, ["memory_bytes"], from_zero=True)),
        ("Gates: the words read the image", gate_chart(steps, evaluations, "gates_text", run)),
        ("Gates: the image reads the words", gate_chart(steps, evaluations, "gates_image", run)),
    ):
        if figure is not None:
            chart = figure.to_html(
                full_html=False, include_plotlyjs=not sections, include_mathjax=False, config=_CONFIG
            )
            sections.append(f"<section><h2>{html.escape(title)}</h2>{chart}</section>")
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    body = "\n".join(sections) or "<p>This run has no step, no evaluation and no start by Slurm yet.</p>"
    name = html.escape(run.resolve().name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{name}</h1><p>Written {html.escape(written)}.</p><pre>{html.escape(screen)}</pre>\n"
        f"<main>{body}</main>\n</body></html>\n"
    )


def curves(records: Records, names: Iterable[str], markers: bool = False, from_zero: bool = False) -> go.Figure | None:
    """One curve a name over the steps; None if no record has any of them."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name in names:
        points = [(record["step"], record[name]) for record in records if _is_number(record.get(name))]
        if points:
            x, y = thinned(points)
            figure.add_scatter(x=x, y=y, name=name, mode="lines")
    if not figure.data:
        return None
    figure.update_xaxes(title="step")
    figure.update_yaxes(exponentformat="power", rangemode="tozero" if from_zero else "normal")
    return _laid_out(figure, 340)


def held_out(evaluations: Records, is_loss: bool) -> go.Figure | None:
    """A curve for each metric and data set, by step: an older checkpoint may have been evaluated later."""
    import plotly.graph_objects as go

    figure = go.Figure()
    data = {(str(record.get("split", "")), str(record.get("data", ""))[:8]): None for record in evaluations}
    for split, fingerprint in data:
        records = [
            record
            for record in evaluations
            if (str(record.get("split", "")), str(record.get("data", ""))[:8]) == (split, fingerprint)
        ]
        label = f" ({split or fingerprint})" if len(data) > 1 else ""
        for name in _numeric_names(records):
            points = sorted((record["step"], record[name]) for record in records if _is_number(record.get(name)))
            if name.startswith("loss") == is_loss:
                x, y = thinned(points)
                figure.add_scatter(x=x, y=y, name=name + label, mode="lines+markers")
    if not figure.data:
        return None
    figure.update_xaxes(title="step")
    return _laid_out(figure, 340)


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most `MAX_POINTS` points; each is the last step and the mean value of as many neighbours."""
    size = -(-len(points) // MAX_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [part[-1][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]


def gate_chart(steps: Records, evaluations: Records, name: str, run: Path) -> go.Figure | None:
    """A heat map of the gates over the steps, a row a layer and level.

    They come from the training steps or the evaluations, whichever have more of them.
    """
    import plotly.graph_objects as go

    def gated(records: Records) -> list[tuple[float, Gates]]:
        return [(record["step"], gates) for record in records if (gates := gates_of(record, name)) is not None]

    of_steps, of_evaluations = gated(steps), gated(evaluations)
    maps = of_steps if len(of_steps) > len(of_evaluations) else sorted(of_evaluations, key=lambda entry: entry[0])
    maps = maps[:: -(-len(maps) // MAX_MAPS)] if maps else []
    if not maps:
        return None
    num_tower = num_tower_levels(run)
    columns = [mean_over_heads(gates_by_layer(gates, num_tower)) for _, gates in maps]
    layers = columns[-1]
    labels = level_names(len(layers[-1]), len(layers))
    rows = [(layer, level) for layer, levels in enumerate(layers) for level in range(len(levels)) if len(levels) > 1]
    figure = go.Figure(
        go.Heatmap(
            x=[step for step, _ in maps],
            y=[f"layer {layer + 1} level {labels[level]}" for layer, level in rows],
            z=[[column[layer][level] for column in columns] for layer, level in rows],
            zmin=0,
            zmax=1,
            colorscale="Blues",
            hovertemplate="step %{x}<br>%{y}<br>%{z:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="step")
    figure.update_yaxes(type="category", autorange="reversed")
    return _laid_out(figure, 160 + 22 * len(rows))


def time_line(run: Path, attempts: Sequence[history.Attempt], is_running: bool) -> go.Figure | None:
    """A bar for each start, coloured by how it ended, and a mark for each checkpoint that is there."""
    import plotly.graph_objects as go

    figure = go.Figure()
    now, shown = time.time(), set()
    for number, attempt in enumerate(attempts):
        is_last = number == len(attempts) - 1
        action = attempt.action or (_RUNNING if is_last and is_running else _LEFT)
        # When a start was cut off is not recorded; at the latest when the next one began.
        following = now if is_last and is_running else attempts[number + 1].time if not is_last else attempt.time
        end = attempt.ended or following
        status = "" if attempt.status is None else f", status {attempt.status}"
        text = f"{action}{status}<br>{html.escape(attempt.reason)}<br>nodes: {html.escape(attempt.nodes) or '?'}"
        figure.add_bar(
            base=[_date(attempt.time)],
            x=[max(end - attempt.time, 1.0) * 1000],
            y=[f"{attempt.job}.{attempt.restart}"],
            orientation="h",
            name=action,
            legendgroup=action,
            showlegend=action not in shown,
            marker_color=_COLOURS.get(action, "#9467bd"),
            hovertext=text,
            hoverinfo="text",
        )
        shown.add(action)
    saved = sorted((path.stat().st_mtime, path.parent.name) for path in run.glob("checkpoints/*/MANIFEST.json"))
    if saved:
        figure.add_scatter(
            x=[_date(when) for when, _ in saved],
            y=[_CHECKPOINTS] * len(saved),
            text=[name for _, name in saved],
            mode="markers",
            name=_CHECKPOINTS,
            marker={"symbol": "diamond", "size": 10, "color": "#444"},
        )
    if not figure.data:
        return None
    figure.update_xaxes(type="date")
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(barmode="overlay")
    return _laid_out(figure, 160 + 26 * (len(attempts) + bool(saved)))


def _laid_out(figure: go.Figure, height: int) -> go.Figure:
    margin = {"l": 60, "r": 20, "t": 20, "b": 40}
    return figure.update_layout(template="plotly_white", height=height, margin=margin, showlegend=True)


def _date(when: float) -> str:
    return datetime.fromtimestamp(when).isoformat(sep=" ", timespec="milliseconds")


def _names(records: Records, prefix: str) -> list[str]:
    return sorted({name for record in records for name in record if name == prefix or name.startswith(f"{prefix}_")})


def _numeric_names(records: Records) -> list[str]:
    names = {name for record in records for name, value in record.items() if _is_number(value)}
    return sorted(names - {"step"})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
