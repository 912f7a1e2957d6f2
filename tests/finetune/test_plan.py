"""``python -m finetune.plan``: what it prints, which errors it names, and the documentation's tables, which are its."""

import json
import shutil

import pytest
import yaml

from finetune import plan
from tests.spawn import ROOT
from unimo3.data.answers import AnswerVocabulary

RECIPES = ROOT / "finetune" / "recipes"
TINY = ("--model", ROOT / "pretrain" / "recipes" / "tiny.yaml", "--gpus", 2)
NAMES = {
    "vqa": ("vqa",),
    "nlvr2": ("nlvr2",),
    "snli_ve": ("snli_ve",),
    "retrieval": ("retrieval_coco", "retrieval_flickr30k"),
}


def run_command(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        plan.main([str(argument) for argument in arguments])
    return end.value.code, capsys.readouterr()


def refused(capsys, *arguments):
    """The lines of errors of a command that exits with status 78."""
    status, output = run_command(capsys, *arguments)
    assert (status, output.out) == (78, "")
    return [line.removeprefix("  - ") for line in output.err.splitlines() if line.startswith("  - ")]


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_task_is_planned_without_data_weights_or_gpu(capsys):
    recipe = ("--config", RECIPES / "nlvr2_tiny.yaml", "--training.steps", 36)
    status, output = run_command(capsys, "nlvr2", *recipe, *TINY, "--json")
    assert status == 0
    report = json.loads(output.out)
    assert (report["unit"], report["not_counted"][-1]) == ("statement", "evaluation")
    assert (report["ds_config"], report["recipe_ds_config"]) == ("zero2_bf16.json", "zero3_fp32.json")
    assert report["time"]["hours"] == pytest.approx(report["time"]["step_s"] / 100)
    assert set(report["activation_bytes_per_pair"]) == {"with_checkpointing", "without_checkpointing"}


@pytest.mark.parametrize(("task", "planned"), [("retrieval", 4), ("vqa", 1)])
def test_a_single_row_on_one_gpu_is_planned_only_without_contrast(capsys, task, planned):
    recipe = ("--config", RECIPES / f"{task}_tiny.yaml", "--training.global_batch", 4, "--training.micro_batch", 1)
    status, output = run_command(capsys, task, *recipe, *TINY, "--gpus", 1, "--json")
    assert status == 0
    sizes = json.loads(output.out)["micro_batch"]
    assert (sizes["planned"], sizes["recipe_fits"]) == (planned, planned == 1)


def test_the_text_names_the_unit_and_what_is_not_counted(capsys):
    recipe = ("--config", RECIPES / "snli_ve_tiny.yaml")
    status, output = run_command(
        capsys,
        "snli_ve",
        *recipe,
        *TINY,
        "--ds-config",
        "ds_configs/zero3_fp32.json",
        "--gpu-memory",
        "800MB",
        "--training.global_batch",
        4096,
        "--training.micro_batch",
        2048,
    )
    assert status == 0
    assert "operations a hypothesis: " in output.out
    assert "activations a hypothesis, MB         saved  at most at once" in output.out
    assert "* zero3_fp32.json" in output.out
    assert "the recipe's 2048 does not fit; set training.micro_batch to " in output.out
    assert output.out.endswith("; waiting for ranks and data, and evaluation come on top\n")


def test_the_task_is_the_first_argument(capsys):
    for arguments in ((), ("--gpus", 8), TINY):
        assert refused(capsys, *arguments) == [
            "TASK: not given; name one of nlvr2, retrieval, snli_ve, vqa as the first argument"
        ]
    assert refused(capsys, "coco", *TINY) == [
        "TASK 'coco': there is no such task; name one of nlvr2, retrieval, snli_ve, vqa"
    ]


def test_the_model_is_named_once(capsys, pretrained):
    assert refused(capsys, "nlvr2", "--gpus", 8)[0].startswith("init: '': names no weights; give --init an exported")
    (problem,) = refused(capsys, "nlvr2", *TINY, "--init", pretrained)
    assert problem == f"--model {TINY[1]}: init '{pretrained}' names the model too; leave one out"
    (problem,) = refused(capsys, "nlvr2", "--gpus", 8, "--init", "nowhere")
    assert problem.startswith("init: 'nowhere': no config.json there; name a folder")


def test_a_recipe_without_a_model_or_with_a_wrong_one_is_named(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for content, problem in (
        ("run: {name: x}", "has no model; name a pretraining recipe, such as pretrain/recipes/base.yaml"),
        ("model: {num_attention_heads: 7}", "model.num_attention_heads: 7: must divide model.hidden_size 768"),
        ("model: {layers: 7}", "model.layers: '7': no such setting; "),
        ("- model", "must contain groups of settings"),
    ):
        recipe.write_text(content)
        (error,) = refused(capsys, "nlvr2", "--gpus", 8, "--model", recipe)
        assert error.startswith(f"--model {recipe}: {problem}")
    (error,) = refused(capsys, "nlvr2", "--gpus", 8, "--model", tmp_path / "none.yaml")
    assert error.startswith(f"--model {tmp_path / 'none.yaml'}: cannot be read (No such file or directory)")


def test_all_errors_are_reported_in_one_message(capsys):
    errors = refused(
        capsys,
        "vqa",
        *TINY,
        "--gpus",
        0,
        "--gpu-memory",
        "80 apples",
        "--training.steps",
        "many",
        "--eval_only",
        "true",
        "--training.micro_batch",
        0,
        "--ds-config",
        "none.json",
    )
    assert [line.split(": ")[0] for line in errors] == [
        "--gpus 0",
        "--gpu-memory 80 apples",
        "training.steps",
        "training.ds_config",
        "training.micro_batch",
        "eval_only",
    ]
    # Those that need the model come after the others.
    errors = refused(capsys, "vqa", *TINY, "--gpus", 1, "--image_size", 70, "--answers", "nowhere.json")
    assert [line.split(": ")[0] for line in errors] == ["image_size", "answers"]
    assert errors[-2] == "image_size: 70: not a multiple of the patch size 16; use 64 or 80"


def test_texts_longer_than_the_models_positions_are_named(capsys):
    (problem,) = refused(capsys, "retrieval", *TINY, "--data.max_text_tokens", 50)
    assert problem.startswith("data.max_text_tokens: 50: model.text.max_position_embeddings 40 allows 38")


def test_weights_of_another_task_are_named(capsys, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "tuned")
    path = tmp_path / "tuned" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"architectures": ["Unimo3ForImagesAndTextClassification"]})
    )
    (problem,) = refused(capsys, "vqa", "--gpus", 8, "--init", tmp_path / "tuned", "--data.max_text_tokens", 12)
    assert problem.startswith(f"init: '{tmp_path / 'tuned'}': contains weights of Unimo3ForImagesAndTextClassification")


def test_a_vocabulary_other_than_that_of_tuned_weights_is_named(capsys, pretrained, tmp_path):
    folder = tmp_path / "tuned"
    shutil.copytree(pretrained, folder)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"num_answers": 2})
    )
    AnswerVocabulary(["dog", "yes"]).save_pretrained(folder)
    AnswerVocabulary(["dog", "no"]).save(tmp_path / "answers.json")
    answers = ("--answers", tmp_path / "answers.json")
    (problem,) = refused(capsys, "vqa", "--gpus", 8, "--init", folder, "--data.max_text_tokens", 12, *answers)
    assert problem.startswith(f"answers: '{tmp_path / 'answers.json'}': lists 2 answers that are not those of the head")


def test_a_batch_that_does_not_divide_is_named(capsys):
    tiny = ("retrieval", "--config", RECIPES / "retrieval_tiny.yaml", *TINY)
    assert refused(capsys, *tiny, "--gpus", 3)[0].startswith("training.global_batch: 64")


def test_arguments_that_do_not_fit_a_table_are_named(capsys):
    entry = f"vqa={RECIPES / 'vqa_tiny.yaml'}"
    assert refused(capsys, "vqa", *TINY, "--table", entry)[0].startswith("TASK 'vqa': a table names the task of each")
    assert refused(capsys, *TINY, "--json", "--table", entry)[0].startswith("--json: a table names the task of each")
    (problem,) = refused(capsys, *TINY, "--table", "vqa")
    assert problem == "--table vqa: names no recipe; use vqa=finetune/recipes/vqa_base.yaml"
    assert refused(capsys, *TINY, "--table", f"x{entry}")[0].startswith("TASK 'xvqa': there is no such task")
    assert refused(capsys, *TINY[:2], "--table", entry)[0].startswith("--gpus: not given")


def documented(size):
    """The rows of a table of docs/finetuning.md, by recipe."""
    text = (ROOT / "docs" / "finetuning.md").read_text()
    lines = text.split(f"<!-- needs {size} -->")[1].split(f"<!-- /needs {size} -->")[0].strip().splitlines()
    return lines[:2], {line.split("`")[1]: line for line in lines[2:]}


# Each task once: a row takes seconds, and sizes differ in their layers alone.
@pytest.mark.parametrize(
    ("size", "names"),
    [
        ("base", {"vqa": ("vqa",), "nlvr2": ("nlvr2",), "retrieval": ("retrieval_coco",)}),
        ("large", {"snli_ve": ("snli_ve",)}),
    ],
    ids=["base", "large"],
)
def test_the_documented_needs_are_those_of_the_recipes(capsys, size, names):
    entries = [f"{task}=finetune/recipes/{name}_{size}.yaml" for task, recipes in names.items() for name in recipes]
    model = f"pretrain/recipes/{size}.yaml"
    _, output = run_command(capsys, "--gpus", 8, "--model", model, "--table", *entries)
    head, rows = documented(size)
    assert list(rows) == [f"{name}_{size}" for recipes in NAMES.values() for name in recipes]
    printed = output.out.strip().splitlines()
    assert printed[:2] == head
    assert printed[2:] == [rows[entry.split("/")[-1].removesuffix(".yaml")] for entry in entries]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*_[bl]a*.yaml")), ids=lambda path: path.stem)
def test_a_documented_row_goes_with_its_recipe_and_fits_on_8_gpus(path):
    _, rows = documented(path.stem.rpartition("_")[2])
    training = yaml.safe_load(path.read_text())["training"]
    cells = [cell.strip(" `") for cell in rows[path.stem].split("|")]
    _, _, ds_config, micro_batch, most_gb, gflops, hours, between_ranks, _ = cells
    assert f"ds_configs/{ds_config}" == training["ds_config"]
    checkpointing = ", with checkpointing" if training.get("activation_checkpointing") else ""
    assert micro_batch == f"{training['micro_batch']}{checkpointing}"
    assert training["global_batch"] % (8 * training["micro_batch"]) == 0
    assert float(most_gb) < 60  # of 80
    operations = float(gflops.replace(",", "")) * 1e9 * training["global_batch"] * training["steps"]
    computing_hours = operations / (8 * 0.4 * 989e12) / 3600
    assert float(hours) == pytest.approx(computing_hours + float(between_ranks), abs=0.006)
