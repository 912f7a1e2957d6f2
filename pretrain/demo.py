"""The complete job in miniature, on two CPU ranks: toy data to VQA accuracy, with a stop and a resume on the way.

Every stage is a command a user would type, printed before it runs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pretrain.toy import blind_rates
from unimo3.errors import EXIT_REQUEUE, CommandParser, ConfigError, exit_with_status
from unimo3.project_files import project_file
from unimo3.training.metrics import read_metrics

NUM_RANKS = 2
LAUNCH = ("unimo3.launch", "-n", str(NUM_RANKS))
MARKER = ".made-by-demo"
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"


class Demo:
    """One run of the demo in a separate folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = time.monotonic()
        is_here = Path.cwd() in Path(sys.executable).parents
        self.python = Path(os.path.relpath(sys.executable) if is_here else sys.executable)

    def run(self, *command: str, expected: int = 0, stop_at_step: int = 0, run_folder: Path | None = None) -> None:
        """Run ``python -m command``; with `stop_at_step`, send SIGTERM once `run_folder` has done that many steps."""
        print(f"\n[{time.monotonic() - self.started:4.0f} s] {self.python} -m {' '.join(command)}", flush=True)
        process = subprocess.Popen([sys.executable, "-m", *command])
        if stop_at_step:
            assert run_folder is not None
            while process.poll() is None and len(read_metrics(run_folder)) < stop_at_step:
                time.sleep(0.5)
            print(f"[{time.monotonic() - self.started:4.0f} s] sending SIGTERM, as a cluster does at its time limit")
            process.send_signal(signal.SIGTERM)
        status = process.wait()
        if status != expected:
            raise RuntimeError(f"status {status}, {expected} expected, from: python -m {' '.join(command)}")

    def everything(self) -> None:
        """All stages."""
        data, shards, runs = self.folder / "data", self.folder / "shards", self.folder / "runs"
        self.run("pretrain.toy", str(data), "--images", "4000", "--size", "64", "--seed", "0")
        self.run(
            "pretrain.prepare_shards",
            "coco",
            "--src",
            str(data / "coco"),
            "--out",
            str(shards / "coco"),
            "--tokenizer-vocab",
            "512",
            "--shard-size",
            "512",
        )
        self.run(
            "pretrain.prepare_shards",
            "vqav2",
            "--src",
            str(data / "vqav2"),
            "--images",
            str(data / "coco"),
            "--out",
            str(shards / "vqav2"),
            "--shard-size",
            "512",
        )

        pretraining = (
            *LAUNCH,
            "pretrain.train",
            "--config",
            "pretrain/recipes/tiny.yaml",
            "--run.dir",
            str(runs),
            "--data.train",
            str(shards / "coco" / "train"),
            "--data.val",
            str(shards / "coco" / "val"),
            "--data.tokenizer",
            str(shards / "coco" / "tokenizer"),
        )
        half = self.steps_of("pretrain/recipes/tiny.yaml") // 2
        self.run(*pretraining, expected=EXIT_REQUEUE, stop_at_step=half, run_folder=runs / "tiny")
        self.run(*pretraining)

        weights = self.folder / "weights"
        self.run("pretrain.export", str(runs / "tiny"), "--out", str(weights), "--dtype", "fp16")
        self.run(
            *LAUNCH,
            "finetune.vqa",
            "--config",
            "finetune/recipes/vqa_tiny.yaml",
            "--init",
            str(weights),
            "--training.steps",
            "300",  # instead of 400: a complete demo in 5 minutes
            "--run.dir",
            str(runs),
            "--data.train",
            str(shards / "vqav2" / "train"),
            "--data.val",
            str(shards / "vqav2" / "val"),
            "--data.tokenizer",
            str(weights),
        )
        answering = self.folder / "weights_vqa"
        self.run("pretrain.export", str(runs / "vqa_tiny"), "--tag", "best", "--out", str(answering))
        question = json.loads((data / "vqav2" / QUESTIONS).read_text())["questions"][0]
        image = data / "coco" / "val2014" / f"COCO_val2014_{question['image_id']:012d}.jpg"
        asked = ("finetune.predict", "vqa", "--weights", str(answering), "--image", str(image), "--text")
        self.run(*asked, question["question"], "--explain", str(self.folder / "why.png"))
        self.run("slurm.status", str(runs / "tiny"), "--html", str(self.folder / "report.html"))
        self.report(data, runs, weights)
        print("\nNext:")
        print(f'  {self.python} -m {" ".join(asked)} "{question["question"]}"')
        print(f"  {self.python.with_name('tensorboard')} --logdir {runs}")
        print(f"  {self.python} -m pretrain.plan --config pretrain/recipes/base.yaml --gpus 8 --gpu-memory 80GB")

    @staticmethod
    def steps_of(recipe: str) -> int:
        """Optimizer steps of a recipe."""
        import yaml

        steps: int = yaml.safe_load(project_file(recipe).read_text())["training"]["steps"]
        return steps

    def report(self, data: Path, runs: Path, weights: Path) -> None:
        """Print what was reached and where to look."""
        rows = [("", "start", "end")]
        for run in ("tiny", "vqa_tiny"):
            records = read_metrics(runs / run)
            losses = [name for name in records[0] if name.startswith("loss")]
            for name in losses:
                start = sum(record[name] for record in records[:10]) / len(records[:10])
                end = sum(record[name] for record in records[-10:]) / len(records[-10:])
                rows.append((f"{run} {name}", f"{start:.3f}", f"{end:.3f}"))
        accuracy = json.loads((runs / "vqa_tiny" / "accuracy.json").read_text())
        blind = blind_rates(data / "vqav2")
        rows.append(("", "blind guess", "model"))
        rows += [(f"VQA accuracy, {group}", f"{blind[group]:.3f}", f"{accuracy[group]:.3f}") for group in blind]
        width = max(len(row[0]) for row in rows)
        print(
            f"\nDone in {time.monotonic() - self.started:.0f} s. First and last ten steps' losses; accuracy on images"
        )
        print("that no training step saw, next to the best guess from the question alone.\n")
        for name, first, second in rows:
            print(f"  {name:<{width}}  {first:>12}  {second:>8}")
        print("\nFiles:")
        for path, about in (
            (runs / "tiny" / "checkpoints", "sharded ZeRO-3 checkpoints"),
            (runs / "tiny" / "metrics.jsonl", "every step's metrics"),
            (weights, "fp16 weights for from_pretrained"),
            (runs / "vqa_tiny" / "predictions.json", "answers in VQAv2's submission format"),
            (self.folder / "report.html", "curves and gates of the pretraining, for a browser"),
            (self.folder / "why.png", "where the words of a question read its image"),
        ):
            print(f"  {path}: {about}")


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Run the demo; see the module's text."""
    parser = CommandParser(prog="python -m pretrain.demo", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="folder for all it writes (default: demo)")
    folder = parser.parse_args(argv).dir
    if folder.exists():
        if not (folder / MARKER).exists():
            raise ConfigError(f"--dir {folder}: exists and was not made by the demo; choose another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    Demo(folder).everything()


if __name__ == "__main__":
    main()
