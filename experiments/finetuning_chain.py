"""The commands from toy data to tuned runs, as a user would type them; a result in the work folder is not made again.

Source: none.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import ROOT
from pretrain.toy import blind_rates
from unimo3.data.blind_baseline import BlindGuesser
from unimo3.data.index import ShardIndex
from unimo3.model.initialization import initialize_weights
from unimo3.model.pretrained import read_exported_config
from unimo3.model.processor import Unimo3Processor
from unimo3.model.unimo3 import Unimo3ForPreTraining

NUM_RANKS = 2
IMAGES, SIZE = 16000, 64
PRETRAINING_STEPS = 600


class ToyTask(NamedTuple):
    """A task, and its toy data.

    Attributes:
        name: of the program and its recipe.
        source: of the shards.
        images: folder of the pictures.
        file: of the run, with its metrics.
        metric: name of the metric in it.
    """

    name: str
    source: str
    images: str
    file: str
    metric: str


VQA = ToyTask("vqa", "vqav2", "coco", "accuracy.json", "overall")
NLVR2 = ToyTask("nlvr2", "nlvr2", "nlvr2", "accuracy.json", "accuracy")
SNLI_VE = ToyTask("snli_ve", "snli_ve", "flickr30k", "accuracy.json", "overall")
RETRIEVAL = ToyTask("retrieval", "flickr30k", "flickr30k", "recall.json", "recall_mean")
TASKS = (VQA, NLVR2, SNLI_VE, RETRIEVAL)


class Chain:
    """The commands, in a work folder.

    Args:
        work: contains all that they make.
    """

    def __init__(self, work: Path):
        self._work = work.resolve()
        self.pretrained = self._work / "weights"
        self._runs = self._work / "runs"

    def prepare(self) -> None:
        """Data, shards, pretraining, export."""
        toy, coco = self._work / "toy", self._shards("coco")
        self._run(toy, "pretrain.toy", str(toy), "--images", str(IMAGES), "--size", str(SIZE))
        sources = {"coco": "coco"} | {task.source: task.images for task in TASKS}
        for source, images in sources.items():
            vocabulary = ("--tokenizer-vocab", "512") if source == "coco" else ()
            self._run(
                self._shards(source) / "val" / "index.json",
                "pretrain.prepare_shards",
                source,
                "--src",
                str(toy / source),
                "--images",
                str(toy / images),
                "--out",
                str(self._shards(source)),
                "--shard-size",
                "256",
                *vocabulary,
            )
        self._run(
            self._runs / "tiny" / "checkpoints" / f"step_{PRETRAINING_STEPS:08d}",
            "unimo3.launch",
            "-n",
            str(NUM_RANKS),
            "pretrain.train",
            "--config",
            "pretrain/recipes/tiny.yaml",
            "--run.dir",
            str(self._runs),
            "--training.steps",
            str(PRETRAINING_STEPS),
            "--data.train",
            str(coco / "train"),
            "--data.tokenizer",
            str(coco / "tokenizer"),
        )
        self._run(
            self.pretrained,
            "pretrain.export",
            str(self._runs / "tiny"),
            "--out",
            str(self.pretrained),
            "--dtype",
            "fp16",
        )

    def random_weights(self, seed: int) -> Path:
        """An exported folder as `pretrained`, with the values that a pretraining run of `seed` starts from."""
        folder = self._work / f"random_{seed}"
        if not folder.exists():
            config = read_exported_config(str(self.pretrained))
            model = Unimo3ForPreTraining(config)
            initialize_weights(model, seed, config.initializer_range)
            Unimo3Processor.from_pretrained(self.pretrained).save_pretrained(folder)
            model.save_pretrained(folder)
        return folder

    def tune(self, task: ToyTask, name: str, init: Path, *settings: str) -> float:
        """Train a task by its tiny recipe from `init` in a run called `name`; its metric on val."""
        shards, made = self._shards(task.source), self._runs / name / task.file
        self._run(
            made,
            "unimo3.launch",
            "-n",
            str(NUM_RANKS),
            f"finetune.{task.name}",
            "--config",
            f"finetune/recipes/{task.name}_tiny.yaml",
            "--init",
            str(init),
            "--run.dir",
            str(self._runs),
            "--run.name",
            name,
            "--data.train",
            str(shards / "train"),
            "--data.val",
            str(shards / "val"),
            "--data.tokenizer",
            str(init),
            *settings,
        )
        return float(json.loads(made.read_text())[task.metric])

    def blind(self, task: ToyTask) -> float:
        """The metric on val of the image-blind baseline."""
        if task == VQA:
            return blind_rates(self._work / "toy" / "vqav2")["overall"]
        if task == RETRIEVAL:
            # One order for all queries: a text's image is among the first k of N with probability k/N, and k texts of
            # as many images are right for k images of N.
            num_images = ShardIndex(self._shards(task.source) / "val").num_samples
            return (1 + 5 + 10) / 3 / num_images
        train, val = (_statements(self._shards(task.source) / split) for split in ("train", "val"))
        return BlindGuesser(train).accuracy(val)["overall"]

    def _shards(self, source: str) -> Path:
        return self._work / "shards" / source

    def _run(self, made: Path, *words: str) -> None:
        """``python -m words``, unless its result is there."""
        if made.exists():
            return
        print(f"python -m {' '.join(words)}", flush=True)
        subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True)


def _statements(shards: Path) -> Iterator[dict[str, Any]]:
    """Statements as the guesser takes them: questions to which all people give the label."""
    index = ShardIndex(shards)
    for shard, number in enumerate(index.samples_per_shard):
        for sample in range(number):
            content = json.loads(index.read(shard, sample)["json"])
            rows = content.get("hypotheses") or [{"text": content.get("statement"), "label": str(content.get("label"))}]
            for statement in rows:
                label = str(statement["label"]).lower()
                yield {
                    "question": statement["text"],
                    "question_type": "",
                    "multiple_choice_answer": label,
                    "answers": [label] * 10,
                }
