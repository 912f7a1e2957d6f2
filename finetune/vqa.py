"""Fine-tuning for visual question answering: exported weights -> accuracy by the official rule and predictions.

Started once a rank; starting it again resumes. The result is RUN/predictions.json in VQAv2's submission format and
RUN/accuracy.json.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unimo3 import config
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.init import config_of, model_files_of, weights_of
from unimo3.data.answers import AnswerVocabulary, vqa_accuracy
from unimo3.data.args import DataArgs
from unimo3.data.blind import accuracy_by_group
from unimo3.data.index import ShardIndex
from unimo3.data.loader import evaluation_batches
from unimo3.data.remote import is_remote
from unimo3.data.samples import VqaSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import Augment, ImageTransform, image_processor
from unimo3.distributed import all_gather_object, world_size_from_environment
from unimo3.errors import ConfigError, DataError, exit_with_status
from unimo3.kernels.args import KernelArgs
from unimo3.model.args import tokenizer_faults
from unimo3.model.config import Unimo3Config
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.model.init import initialize_weights
from unimo3.model.pretrained import load_exported
from unimo3.model.processor import Unimo3Processor
from unimo3.objectives.vqa import VqaTask
from unimo3.training.engine import BatchPlan, build_engine, build_model, prepare_layers, read_ds_config
from unimo3.training.evaluation import Evaluation, Guard, to_device
from unimo3.training.loop import TrainingArgs, train
from unimo3.training.optim import OptimArgs
from unimo3.training.run import Run, RunArgs, changed_settings
from unimo3.training.start import start_process


@dataclass(frozen=True)
class VqaConfig:
    """All settings of a VQA fine-tuning run."""

    run: RunArgs = field(default_factory=RunArgs)
    init: str = ""
    """What to start from: an exported folder, or a run or one of its checkpoints, which is exported into this run's
    folder first. data.tokenizer: the same exported folder, or RUN/model."""
    answers: str = ""
    """Answer vocabulary; the answers.json beside the training shards if empty."""
    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    training: TrainingArgs = field(default_factory=TrainingArgs)
    kernels: KernelArgs = field(default_factory=KernelArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)

    def faults(self) -> list[str]:
        """Say which settings do not fit together, one line a fault."""
        found = self.batch_plan(world_size_from_environment()).faults() + changed_settings(self)
        found += self.data.shard_faults("questions")
        if not self.answers and (len(self.data.sources) > 1 or is_remote(next(iter(self.data.sources)))):
            found.append(
                "answers: '': name the answer vocabulary, an answers.json, where data.train is no single folder"
            )
        else:
            try:
                AnswerVocabulary.load(self.answers_path)
            except DataError as error:
                found.append(f"answers: {error}")
        try:
            model = config_of(self.init, self.run.folder)
        except ConfigError as error:
            return found + error.faults
        try:
            tokenizer = load_tokenizer(self.data.tokenizer)
        except ConfigError:
            return found  # the data's own check has said so
        found += tokenizer_faults(model.text_config, tokenizer, self.data.max_text_tokens)
        try:
            trained = load_tokenizer(model_files_of(self.init, self.run.folder))
        except ConfigError:
            return [
                *found, f"init: '{self.init}': holds no tokenizer; name a folder that python -m pretrain.export wrote"
            ]  # fmt: skip
        if trained.get_vocab() != tokenizer.get_vocab():
            found.append(
                f"data.tokenizer: '{self.data.tokenizer}': has another vocabulary than the weights were trained with; "
                f"use {model_files_of(self.init, self.run.folder)}"
            )
        return found

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How the global batch is spread over `world_size` ranks."""
        return BatchPlan(self.training.global_batch, self.training.micro_batch, world_size)

    @property
    def answers_path(self) -> Path:
        """File of the answer vocabulary."""
        return Path(self.answers) if self.answers else Path(next(iter(self.data.sources))).parent / "answers.json"


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Train until done, interrupted or in error; unimo3/errors.py lists the exit statuses."""
    settings = config.parse(VqaConfig, argv, "python -m finetune.vqa", __doc__ or "")
    tokenizer = load_tokenizer(settings.data.tokenizer)
    answers = AnswerVocabulary.load(settings.answers_path)
    model_config: Unimo3Config = config_of(settings.init, settings.run.folder)
    model_config.num_answers = len(answers)
    indexes, val_index = settings.data.open_train(), settings.data.open_val()
    world, stop, watch = start_process(settings.run, settings.training.stall_after_s)
    weights = weights_of(settings.init, settings.run.folder)

    batch = settings.batch_plan(world.size)
    image_size = model_config.vision_config.image_size

    ds_config = read_ds_config(settings.training.ds_config, batch, settings.optim.clip_norm)
    model = build_model(ds_config, lambda: Unimo3ForVisualQuestionAnswering(model_config))
    initialize_weights(model, settings.run.seed, model_config.initializer_range)
    load_exported(model, weights, fresh=r"^vqa_head\.", unused=r"^(mlm|itm|itc)_head\.")
    training = settings.training
    prepare_layers(model, settings.kernels, training.activation_checkpointing, training.compile_towers)
    engine = build_engine(VqaTask(model), model, ds_config, settings.optim)
    run = Run(settings, batch.global_batch, settings.data.fingerprint(indexes))
    run.write_model_files(model_config, Unimo3Processor(image_processor(image_size), tokenizer), answers)
    run.resume(engine)

    def samples_of(index: ShardIndex, augment: Augment, crop_scale: float) -> VqaSamples:
        transform = ImageTransform(image_size, augment, crop_scale)
        return VqaSamples(index, tokenizer, settings.data.max_text_tokens, transform, answers, settings.run.seed)

    loader = settings.data.training_loader(
        [samples_of(index, settings.data.augment, settings.data.crop_scale) for index in indexes],
        batch.global_batch, batch.micro_batch, world.rank, world.size, settings.run.seed, run.step,
    )  # fmt: skip
    reader = settings.data.reader

    def evaluate(step: int, guard: Guard) -> dict[str, float] | None:
        held_out = samples_of(val_index, "none", 1.0)
        batches = evaluation_batches(held_out, world.rank, world.size, batch.micro_batch, reader)
        own: list[dict[str, Any]] = []
        for loaded, counts in guard.batches(batches):
            own += predict(engine, loaded, counts, answers)
        if guard.is_cut:
            return None
        scored = [entry for part in all_gather_object(own) for entry in part]
        accuracies = accuracy_by_group((entry["group"], entry["accuracy"]) for entry in scored)
        if world.rank == 0:
            write_results(run.folder, scored, accuracies)
        return {f"accuracy_{group}": accuracy for group, accuracy in accuracies.items()}

    evaluation = Evaluation(val_index.fingerprint, evaluate) if val_index is not None else None
    train(run, engine, loader, settings.training, settings.optim, settings.checkpoint, stop, watch, evaluation)
    run.close()


@torch.no_grad()
def predict(
    engine: Any, loaded: dict[str, Any], counts: torch.Tensor, answers: AnswerVocabulary
) -> list[dict[str, Any]]:
    """Predictions for the rows of a batch that count, each with its official accuracy and its granularity or type."""
    engine.eval()
    best = engine(to_device(loaded, engine.device))["logits"].argmax(dim=-1).tolist()
    return [
        {
            "question_id": question["question_id"],
            "answer": answers.answers[number],
            "group": question.get("granularity") or question.get("answer_type", ""),
            "accuracy": (
                vqa_accuracy(answers.answers[number], question["answers"]) if question.get("answers") else 0.0
            ),
        }
        for question, number, is_counted in zip(loaded["question"], best, counts.tolist(), strict=True)
        if is_counted
    ]


def write_results(folder: Path, scored: list[dict[str, Any]], accuracies: dict[str, float]) -> None:
    """Write the submission file and the accuracies, each by rename."""
    submission = sorted(
        ({"question_id": entry["question_id"], "answer": entry["answer"]} for entry in scored),
        key=lambda entry: entry["question_id"],
    )
    for name, content in (("predictions.json", submission), ("accuracy.json", accuracies)):
        staging = folder / f"{name}.tmp"
        staging.write_text(json.dumps(content, indent=1 if name == "accuracy.json" else None) + "\n")
        staging.replace(folder / name)


if __name__ == "__main__":
    main()
