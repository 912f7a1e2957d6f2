"""Does fine-tuning learn, and does pretraining help it? On toy data in the public formats, on CPUs.

Two tables: each task by its tiny recipe from an exported `tiny`, next to the image-blind baseline; and VQA
and retrieval from those weights against random ones at equal steps, with three seeds. The first goes into the README.

Source: none.
"""

import argparse
from pathlib import Path

from benchmarks.report import ROOT, write_report
from experiments.finetuning_chain import NLVR2, PRETRAINING_STEPS, RETRIEVAL, SNLI_VE, VQA, Chain, ToyTask

SEEDS = (0, 1, 2)
# The least by which a task's metric must pass the blind guess.
MARGINS = {VQA: 0.1, NLVR2: 0.05, SNLI_VE: 0.1, RETRIEVAL: 0.3}
COMPARED_STEPS = {VQA: 150, RETRIEVAL: 60}
# Pretraining's rate: random weights may need a larger one than trained weights do.
RANDOM_LR = "1e-3"
README = ROOT / "README.md"
README_MARKS = ("<!-- experiments/finetuning.py writes this table -->\n", "<!-- end -->\n")


def blind_table(chain: Chain) -> tuple[str, list[str]]:
    """Every task next to the best blind guess; the table, and the tasks that miss their margin."""
    lines = [
        "| task | metric on `val` | image-blind baseline | model | margin | required margin |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    missed = []
    for task, wanted in MARGINS.items():
        value, blind = chain.tune(task, f"{task.name}_tiny", chain.pretrained), chain.blind(task)
        lines.append(
            f"| `{task.name}` | `{task.metric}` | {blind:.3f} | {value:.3f} | {value - blind:+.3f} | {wanted:+.3f} |"
        )
        missed += [task.name] if value - blind < wanted else []
    return "\n".join(lines), missed


def initial_weights_table(chain: Chain) -> tuple[str, list[str]]:
    """Pretrained against random weights; the table, and the tasks where pretraining does not win with every seed."""
    lines = [
        "| task | steps | start | rate | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |",
        "| --- | --- | --- | --- | " + " | ".join("---" for _ in SEEDS) + " |",
    ]
    lost = []
    for task in COMPARED_STEPS:
        pretrained = [_tune(chain, task, "pretrained", seed, chain.pretrained) for seed in SEEDS]
        random, at_own_rate = (
            [_tune(chain, task, kind, seed, chain.random_weights(seed), *settings) for seed in SEEDS]
            for kind, settings in (("random", ()), ("random_fast", ("--optim.lr", RANDOM_LR)))
        )
        for start, rate, values in (
            ("pretrained", "the recipe's", pretrained),
            ("random", "the recipe's", random),
            ("random", RANDOM_LR, at_own_rate),
        ):
            shown = " | ".join(f"{value:.3f}" for value in values)
            lines.append(f"| `{task.name}` | {COMPARED_STEPS[task]} | {start} | {rate} | {shown} |")
        lost += [task.name] if min(pretrained) <= max(random + at_own_rate) else []
    return "\n".join(lines), lost


def _tune(chain: Chain, task: ToyTask, kind: str, seed: int, init: Path, *settings: str) -> float:
    steps = str(COMPARED_STEPS[task])
    overrides = ("--training.steps", steps, "--checkpoint.every_steps", steps, "--best.keep", "false", *settings)
    return chain.tune(task, f"{task.name}_{kind}_{seed}", init, "--run.seed", str(seed), *overrides)


def write_readme(table: str) -> None:
    """Put the table between the README's marks."""
    before, mark, rest = README.read_text().partition(README_MARKS[0])
    _, end, after = rest.partition(README_MARKS[1])
    README.write_text(f"{before}{mark}{table}\n{end}{after}")


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work/finetuning"), help="folder for all but the result")
    chain = Chain(parser.parse_args().work)
    chain.prepare()
    tasks, missed = blind_table(chain)
    starts, lost = initial_weights_table(chain)
    below = f"Below the required margin: {', '.join(missed)}." if missed else "All reach the required margin."
    ahead = (
        f"Not ahead with every seed: {', '.join(lost)}."
        if lost
        else "The worst seed of the pretrained start is ahead of the best of either random one."
    )
    body = f"""\
## Against the image-blind baseline

{tasks}

{below} Each recipe's tiny version, one seed, 2 ranks under ZeRO-3, from the same exported `tiny`, pretrained for
{PRETRAINING_STEPS} steps. The guess for the first three is the best of several rules on the very texts it is measured
on (`unimo3/data/blind_baseline.py`); for retrieval it is one order of all candidates for every query.

## Pretrained against random weights

{starts}

{ahead}

The metric is the one above. A seed draws the order of the data, the task's head and the random weights; the pretrained
ones are the same. Nothing else differs between the lines of a task but the rate."""
    write_report(ROOT / "experiments" / "results" / "finetuning.md", "Fine-tuning on toy data", body)
    write_readme(tasks)
    print(f"{tasks}\n{below}\n\n{starts}\n{ahead}")


if __name__ == "__main__":
    main()
