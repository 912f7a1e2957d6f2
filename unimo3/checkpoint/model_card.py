"""The model card of an export, README.md, from what the run and its checkpoint have recorded.

Source: Hugging Face's model cards, https://huggingface.co/docs/hub/model-cards.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unimo3 import __version__
from unimo3.checkpoint.casting import TensorReport
from unimo3.checkpoint.manifest import STATE
from unimo3.checkpoint.state import TrainState
from unimo3.json_lines import read_records

CARD = "README.md"
_PAPER = "2305.13697"
_SHORT = 12  # characters of a fingerprint
# Settings that name the weights a run started from.
_INITIAL = ("init", "model.init", "model.text.init", "model.vision.init")


def write_card(run: Path, checkpoint: Path, out: Path, dtype: str, reports: Sequence[TensorReport]) -> None:
    """Write the card into a folder that has the weights and ``config.json``.

    Args:
        run: whose metrics are read.
        dtype: that was asked for; `reports` have each tensor's.

    Raises:
        CheckpointError: the checkpoint has no state of a run.
    """
    from huggingface_hub import ModelCard, ModelCardData

    state = TrainState.read(checkpoint / STATE)
    settings: dict[str, Any] = state.extra.get("settings", {})
    named = json.loads((out / "config.json").read_text()).get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    sections = {
        "Use": _use(architecture),
        "Training": _training(state, settings),
        "Data": _data(state),
        "Metrics on held-out data": _metrics(run, state.step),
        "Weights": _weights(dtype, reports),
        "Limits": _limits(settings),
        "Licence": "Not set. Before you publish the folder, add `license:` to the header above. The weights derive "
        "from the data and from the initial weights, which have licences of their own.",
    }
    data = ModelCardData(library_name="unimo3", tags=["unimo3", "vision-language", f"arxiv:{_PAPER}"])
    text = f"# {settings.get('run.name', run.name)}\n\n{architecture or 'Weights'} of UNIMO-3, "
    text += f"[arXiv {_PAPER}](https://arxiv.org/abs/{_PAPER}). "
    text += f"unimo3 {__version__} exported them from `{checkpoint.name}`."
    text += "".join(f"\n\n## {title}\n\n{content}" for title, content in sections.items())
    # Names of data sets are those of folders, which need not be UTF-8.
    card = f"---\n{data.to_yaml()}\n---\n\n{text}\n".encode("utf-8", "backslashreplace").decode()
    ModelCard(card).save(out / CARD)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [head, ["---"] * len(head), *([str(cell).replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _use(architecture: str) -> str:
    if not architecture:
        return "The configuration names no class."
    module = "unimo3" if architecture == "Unimo3ForPreTraining" else "downstream"
    return (
        f"```python\nfrom unimo3.model.{module} import {architecture}\n"
        "from unimo3.model.processor import Unimo3Processor\n\n"
        f'model = {architecture}.from_pretrained("FOLDER").float().eval()\n'
        'processor = Unimo3Processor.from_pretrained("FOLDER")\n```'
    )


def _training(state: TrainState, settings: dict[str, Any]) -> str:
    rows: list[tuple[str, object]] = [
        ("optimizer steps", f"{state.step} of {settings.get('training.steps', 'unknown')}"),
        ("samples", state.samples_consumed),
        ("global batch", state.global_batch),
        ("ranks and engine of the last save", f"{state.world_size}, {state.engine or 'unknown'}"),
        *((f"`{name}`", settings[name]) for name in _INITIAL if settings.get(name)),
        ("hash of all settings", f"`{state.config_hash[:_SHORT]}`"),
    ]
    return _table(("", "value"), rows)


def _data(state: TrainState) -> str:
    everything = f"The fingerprint of all training data is `{state.index_fingerprint}`."
    sources: list[dict[str, Any]] = state.extra.get("data", [])
    if not sources:
        return f"{everything} The run did not record the names of the data sets."
    names = ("dataset", "split", "samples", "weight", "fingerprint")
    return _table(names, [[source.get(name, "") for name in names] for source in sources]) + f"\n\n{everything}"


def _metrics(run: Path, step: int) -> str:
    """The last evaluation on each held-out data set, up to the exported step."""
    records = [record for record in read_records(run / "metrics.jsonl") if record.get("group") == "eval"]
    newest = {
        str(record.get("data")): record
        for record in records
        if isinstance(record.get("step"), int) and record["step"] <= step
    }
    rows = [
        (record["step"], record.get("split", "held-out"), f"`{data[:_SHORT]}`", f"`{name}`", f"{value:.4f}")
        for data, record in newest.items()
        for name, value in record.items()
        if name != "step" and isinstance(value, float)
    ]
    if not rows:
        return "None: the run had no evaluation up to this step."
    note = "They were measured in the training's precision, before the weights were cast."
    return _table(("step", "split", "data", "metric", "value"), rows) + f"\n\n{note}"


def _weights(dtype: str, reports: Sequence[TensorReport]) -> str:
    counts = Counter(report.dtype for report in reports)
    largest = max(reports, key=lambda report: report.largest)
    rows: list[tuple[str, object]] = [
        ("type asked for", dtype),
        ("tensors", ", ".join(f"{count} {name}" for name, count in counts.most_common())),
        ("largest magnitude", f"{largest.largest:.4g}, `{largest.name}`"),
        ("values beyond the type's range", sum(report.num_over_range for report in reports)),
        ("values that became zero", sum(report.num_flushed for report in reports)),
    ]
    return _table(("", "value"), rows) + "\n\n`export_report.json` has these numbers and a SHA-256 for each tensor."


def _limits(settings: dict[str, Any]) -> str:
    lines = [
        "The model repeats what its data contain and lack. No test of bias or safety was made.",
        "It knows the language of its training texts alone.",
        "The paper's formula of the gates is not public. The formula used here is this project's.",
    ]
    if length := settings.get("data.max_text_tokens"):
        lines.append(f"Texts are cut after {length} tokens.")
    return "\n".join(f"- {line}" for line in lines)
