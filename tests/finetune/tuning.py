"""Tunes all tasks for two steps in one process, without a launcher, as their programs do.

WEIGHTS is an export of pretraining, SHARDS contains vqa/, nlvr2/, snli_ve/, retrieval/ and winoground/. FOLDER gets a
run of each task's name, and next to it ``NAME.safetensors``: what the trained engine gives for `fixed_batch`. NLVR2 is
tuned in bf16. The run ``choose`` evaluates the run ``retrieval``.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune.choose import ChooseConfig
from finetune.nlvr2 import Nlvr2, Nlvr2Config
from finetune.program import FinetuneConfig, finetune
from finetune.retrieval import Retrieval, RetrievalConfig
from finetune.snli_ve import SnliVe, SnliVeConfig
from finetune.task import HeldOut, Results, Task
from finetune.vqa import Vqa, VqaConfig
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs
from unimo3.training.args import TrainingArgs
from unimo3.training.evaluation import Guard
from unimo3.training.optim import OptimArgs
from unimo3.training.retrieval.args import RankingArgs
from unimo3.training.run import RunArgs

BATCH = 4
KINDS = {"vqa": VqaConfig, "nlvr2": Nlvr2Config, "snli_ve": SnliVeConfig, "retrieval": RetrievalConfig}


def fixed_batch(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Texts and images that no data set has."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    shape = (3, 2, 3, 16, 16) if name == "nlvr2" else (3, 3, 16, 16)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(shape, generator=generator).to(dtype)}


def settings(name: str, weights: Path, shards: Path, folder: Path) -> FinetuneConfig:
    """A run of two steps on one rank."""
    ds_config = folder / f"{name}.json"
    ds_config.write_text(
        json.dumps(
            {"bf16": {"enabled": name == "nlvr2"}, "zero_optimization": {"stage": 3}, "steps_per_print": 1000000000}
        )
    )
    data = shards / name
    changes = {"ranking": RankingArgs(shortlist=0)} if name == "retrieval" else {}
    return KINDS[name](
        run=RunArgs(name=name, dir=str(folder)),
        init=str(weights),
        data=DataArgs(
            train=str(data / "train"), val=str(data / "val"), tokenizer=str(weights), max_text_tokens=12, num_workers=0
        ),
        optim=OptimArgs(lr=1e-3, head_factor=2.0),
        training=TrainingArgs(
            steps=2, global_batch=BATCH, micro_batch=BATCH, ds_config=str(ds_config), eval_every=2, log_every=1
        ),
        checkpoint=CheckpointArgs(every_steps=2, keep_last=1),
        **changes,
    )


def noting(task: Task, name: str, path: Path) -> Task:
    """The task, whose evaluation also saves the logits of `fixed_batch`."""
    evaluate = task.evaluate

    def evaluate_and_note(engine: Any, held_out: HeldOut, guard: Guard) -> Results | None:
        engine.eval()
        with torch.no_grad():
            out = engine.module.model(**fixed_batch(name, torch.bfloat16 if name == "nlvr2" else torch.float32))
        kinds = ("logits", "logits_per_image") if name == "retrieval" else ("logits",)
        save_file({kind: out[kind] for kind in kinds}, path)
        return evaluate(engine, held_out, guard)

    task.evaluate = evaluate_and_note
    return task


def tune_all(weights: Path, shards: Path, folder: Path) -> None:
    """See the module's text."""
    tasks = {
        "vqa": Vqa(AnswerVocabulary.load(shards / "vqa" / "answers.json")),
        "nlvr2": Nlvr2(),
        "snli_ve": SnliVe(),
        "retrieval": Retrieval(RankingArgs(shortlist=0), 0),
    }
    for name, task in tasks.items():
        tuning = settings(name, weights, shards, folder)
        assert tuning.validate() == [], tuning.validate()
        finetune(tuning, noting(task, name, folder / f"{name}.safetensors"))
    choosing = choose_settings(folder / "retrieval", weights, shards / "winoground" / "test", folder)
    assert choosing.validate() == [], choosing.validate()
    finetune(choosing, choosing.build_task())


def choose_settings(init: Path, tokenizer: Path, shards: Path, folder: Path, **changes: Any) -> ChooseConfig:
    """An evaluation of choices on one rank; FOLDER has retrieval.json, a ds_config."""
    return ChooseConfig(
        run=RunArgs(name="choose", dir=str(folder)),
        init=str(init),
        data=DataArgs(val=str(shards), tokenizer=str(tokenizer), max_text_tokens=12, num_workers=0),
        training=TrainingArgs(global_batch=BATCH, micro_batch=BATCH, ds_config=str(folder / "retrieval.json")),
        **changes,
    )
