"""Each check of submit by a command that it refuses; on a machine without Slurm."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from slurm import bad_nodes, submit, submit_checks
from slurm.commands import job_environment
from slurm.site_config import Site, read_site

# Has no room: what the kernel shows there takes none.
FULL = Path("/sys/kernel")


@pytest.fixture
def checked(recipe, tmp_path, monkeypatch, capsys):
    """Runs submit as a user without Slurm; its status and what it has printed."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "bash").symlink_to(shutil.which("bash"))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("BAD_NODES", str(tmp_path / "bad_nodes.jsonl"))
    monkeypatch.setenv("UNIMO3_SITE", str(tmp_path / "site.env"))

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            submit.main([str(word) for word in words])
        printed = capsys.readouterr()
        return ended.value.code, printed.err + printed.out

    return run


@pytest.fixture
def training(recipe, tmp_path):
    """Words of a pretraining that nothing is wrong with."""
    return ("pretrain", "--config", recipe, "--run.dir", tmp_path / "runs", "--run.name", "run")


def refused(printed, *errors):
    status, text = printed
    assert status == 78, text
    for problem in errors:
        assert problem in text


@pytest.mark.integration
def test_a_command_without_errors_is_shown_and_needs_no_slurm(checked, training):
    status, text = checked("--dry-run", "--nodes", "1-2", *training)
    assert status == 0
    options = "--nodes=1-2 --mincpus=1 --export=ALL,UNIMO3_RANKS_PER_NODE=1"
    assert text.splitlines()[-1].startswith(f"sbatch --parsable {options} --job-name=run ")
    refused(checked(*training), "sbatch: not found on this machine")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--nodes", "2-1"], "--nodes 2-1: a number, or MIN-MAX"),
        (["--time", "soon"], "--time soon: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS"),
        (["--time", "5", "--grace", "300"], "--grace 300: must be above 60 s and below --time"),
        (["--grace", "60"], "--grace 60: must be above 60 s and below --time"),
        (["--chain", "0"], "--chain 0: at least 1 link"),
        (["--ranks-per-node", "0"], "--ranks-per-node 0: at least 1"),
        (["--nodez", "1"], "unrecognized arguments: --nodez"),
        (["--grace", "long"], "argument --grace: invalid int value: 'long'"),
    ],
)
def test_an_impossible_option_is_refused(checked, training, options, problem):
    refused(checked(*options, *training), problem)


@pytest.mark.integration
def test_a_run_that_was_asked_to_stop_is_not_submitted_again(checked, training, tmp_path):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "stop").touch()
    refused(checked(*training), "this file makes every start of the run exit immediately; remove the file")


@pytest.mark.integration
def test_the_batch_has_to_divide_for_every_number_of_nodes(checked, training):
    printed = checked("--nodes", "1-4", *training)
    refused(printed, "(3 nodes)", "(4 nodes)")
    assert "(1 nodes)" not in printed[1]
    assert "(2 nodes)" not in printed[1]
    refused(checked("--ranks-per-node", "3", *training), "does not divide")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--training.ds_config", "removed.json"], "has 'elasticity', which this project does not use; remove it"),
        (["--training.ds_config", "unknown.json"], "'zero_optimization.stag': DeepSpeed knows no such key"),
        (["--data.train", "nowhere"], "data.train: 'nowhere'"),
        (["--run.dir", FULL], f"{FULL}/run: 3 checkpoints of "),
        (["--run.name", "a/b"], "run.name: 'a/b'"),
        (["--run.name", "new\nline"], "run.name 'new\\nline'"),
        (["--config", "missing.yaml"], "--config missing.yaml: cannot be read"),
        (["--optim.lrr", "1"], "optim.lrr: '1': no such setting; did you mean optim.lr?"),
    ],
)
def test_a_setting_that_would_fail_is_refused(checked, training, tmp_path, arguments, problem):
    (tmp_path / "removed.json").write_text('{"elasticity": {}, "zero_optimization": {"stage": 3}}')
    (tmp_path / "unknown.json").write_text('{"zero_optimization": {"stage": 3, "stag": 3}}')
    words = [tmp_path / word if word in ("removed.json", "unknown.json") else word for word in arguments]
    refused(checked(*training, *words), problem)


@pytest.mark.integration
def test_all_errors_are_reported_in_one_message(checked):
    printed = checked("--chain", "0", "finetune", "vqa", "--init", "no_weights", "--data.train", "nowhere")
    refused(printed, "--chain 0", "data.train: 'nowhere'", "init: 'no_weights'")
    printed = checked("--nodes", "0", "finetune", "nothing", "--config", "missing.yaml")
    refused(
        printed, "--nodes 0", "'finetune.nothing': there is no such program", "--config missing.yaml: cannot be read"
    )
    assert "takes a task first: nlvr2, retrieval, snli_ve, vqa, choose" in printed[1]
    status, output = checked("finetune", "--help")
    assert (status, "{nlvr2,retrieval,snli_ve,vqa,choose}" in output) == (0, True)


@pytest.mark.integration
@pytest.mark.parametrize("module", ["program", "task", "results", "weights"])
def test_shared_modules_are_no_tasks(checked, module):
    refused(checked("finetune", module), f"'finetune.{module}': there is no such program")


@pytest.mark.integration
def test_the_disk_need_follows_from_the_runs_checkpoints(checked, training, tmp_path):
    newest = tmp_path / "runs" / "run" / "checkpoints" / "step_00000004"
    newest.mkdir(parents=True)
    (newest / "MANIFEST.json").write_text(json.dumps({"files": [{"name": "x", "bytes": 10**18}]}))
    refused(
        checked(*training, "--checkpoint.keep_last", "2", "--checkpoint.keep_every", "10"),
        "run: 5 checkpoints of 1000000000.0 GB need 5000000000.0 GB",  # 2, the one being written, steps 10 and 20
    )


@pytest.fixture
def tuning(pretrained, vqav2, tmp_path):
    """Words of a fine-tuning that nothing is wrong with; its weights are `pretrained`, or a run of theirs."""
    run = tmp_path / "pretraining"
    (run / "checkpoints").mkdir(parents=True)
    (run / "model").symlink_to(pretrained)

    def words(*more, init=pretrained):
        data = ("--data.train", vqav2 / "train", "--data.val", vqav2 / "val", "--data.tokenizer", pretrained)
        sizes = ("--training.global_batch", 2, "--training.micro_batch", 2, "--data.max_text_tokens", 8)
        return ("finetune", "vqa", "--init", run if init == "run" else init, *data, *sizes, *more)

    return words


@pytest.mark.integration
def test_a_new_fine_tunings_disk_follows_from_the_weights_it_starts_from(checked, tuning, pretrained, monkeypatch):
    with safe_open(pretrained / "model.safetensors", "pt") as weights:
        elements = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    # To 0.1 MB, as the message has it in place of GB.
    monkeypatch.setattr(submit_checks, "_GB", 1e6)
    checkpoints = 12 * elements / 1e6
    full = ("--run.dir", FULL)
    # keep_last, the best one, and the one being written.
    refused(checked(*tuning(*full)), f"run: 5 checkpoints of {checkpoints:.1f} GB need {5 * checkpoints:.1f} GB")
    refused(checked(*tuning(*full, "--best.keep", "false")), "run: 4 checkpoints of ")
    exported = f"and the export of init's weights of {4 * elements / 1e6:.1f} GB need "
    refused(checked(*tuning(*full, init="run")), exported)
    assert checked("--dry-run", *tuning(init="run"))[0] == 0


@pytest.mark.integration
def test_a_new_runs_notice_states_that_nothing_was_measured(checked, training):
    status, text = checked("--dry-run", *training)
    assert status == 0
    assert "note: the run has no steps yet: --grace, --time and --chain could not be checked" in text


def test_variables_of_an_outer_job_are_not_passed_on(monkeypatch):
    outer = {"SLURM_ARRAY_JOB_ID": "1", "SBATCH_PARTITION": "p", "UNIMO3_RANKS_PER_NODE": "5"}
    for name, value in (outer | {"SLURM_CONF": "/c", "UNIMO3_SITE": "s"}).items():
        monkeypatch.setenv(name, value)
    environment, dropped = job_environment()
    assert set(outer) <= set(dropped)
    assert not outer.keys() & environment.keys()
    assert (environment["SLURM_CONF"], environment["UNIMO3_SITE"]) == ("/c", "s")


@pytest.mark.integration
def test_variables_that_are_not_passed_on_are_named(checked, training, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "p")
    status, text = checked("--dry-run", *training)
    assert status == 0
    assert "note: SBATCH_PARTITION: not passed to sbatch; write sbatch options into SBATCH_OPTIONS of" in text


def test_only_a_wait_for_the_end_of_a_job_counts_as_one():
    assert submit.awaited_jobs("") == set()
    assert submit.awaited_jobs("afterany:12") == {"12"}
    assert submit.awaited_jobs("afterok:12:13,afternotok:14") == {"12", "13", "14"}
    assert submit.awaited_jobs("after:12+5") == set()  # after its start
    assert submit.awaited_jobs("after:12,afterok:13") == {"13"}
    assert submit.awaited_jobs("afterok:12?afterok:13") == set()  # whichever comes first
    assert submit.awaited_jobs("afterany:12_3") == set()  # one link, the next still comes
    assert submit.awaited_jobs("singleton") == set()


def write_metrics(run):
    """A run whose steps take 2 s and whose longest save took 200 s."""
    run.mkdir(parents=True)
    steps = [{"step": n, "step_s": 2.0, "pairs_per_s": 4.0, "loss": 1.0} for n in range(1, 5)]
    saves = [{"group": "save", "step": 4, "save_s": save_s} for save_s in (200.0, 10.0)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*steps, *saves]))


@pytest.mark.integration
def test_grace_and_wall_time_are_compared_with_the_runs_metrics(checked, training, tmp_path):
    write_metrics(tmp_path / "runs" / "run")
    refused(
        checked("--grace", "461", *training),
        "a save has taken 200.0 s and a step takes 2.0 s; at least 462 are needed",
    )
    refused(
        checked("--grace", "500", "--time", "11:00", *training),
        "--time: 660 s minus the grace period is too short for one step of 2.0 s",
    )
    words = (*training, "--training.steps", "1804")
    status, text = checked("--grace", "500", "--time", "0:25:00", "--chain", "4", "--dry-run", *words)
    assert status == 0
    assert "1.0 hours of steps remain, which needs 4 jobs of length --time, and the chain has 4" in text
    refused(
        checked("--grace", "500", "--time", "0:25:00", "--chain", "3", *words),
        "--chain 3: 1.0 hours of steps remain, which needs 4 jobs of length --time; give --chain 4, or a longer --time",
    )
    assert checked("--grace", "500", "--time", "0:25:00", "--dry-run", *words)[0] == 0  # requeued by itself


@pytest.mark.integration
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("SBATCH_OPTIONS=(--partition=x", "site.env: bash cannot read it"),
        ("echo $NOT_SET", "site.env: bash cannot read it"),
        ("GPUS_PER_NODE=eight", "site.env: GPUS_PER_NODE or RANKS_PER_NODE 'eight'"),
        ("RANKS_PER_NODE=0", "site.env: GPUS_PER_NODE or RANKS_PER_NODE '0'"),
    ],
)
def test_an_invalid_site_file_is_refused(checked, training, tmp_path, content, problem):
    (tmp_path / "site.env").write_text(content + "\n")
    refused(checked(*training), problem)


@pytest.mark.integration
def test_each_kind_of_job_gets_the_options_that_the_site_has_for_it(checked, training, source, tmp_path):
    (tmp_path / "site.env").write_text(
        "GPUS_PER_NODE=2 SBATCH_OPTIONS=(--partition=gpu --exclude=n7 '--comment=two words' --signal=USR2@90) "
        "SBATCH_OPTIONS_CPU=(--partition=cpu)\n"
    )
    bad_nodes.add(tmp_path, "n1", "no GPU", "3")
    status, text = checked("--dry-run", *training)
    assert status == 0
    assert "--partition=gpu --exclude=n7 '--comment=two words'" in text
    assert "--ntasks-per-node=2" in text
    # The site's own stay excluded; the names are Slurm's to take apart where there is one.
    assert "--exclude=n1,n7" in text
    conversion = ("prepare_shards", "coco", "--src", source, "--out", tmp_path / "coco")
    status, text = checked("--dry-run", "--ranks-per-node", "4", *conversion)
    assert status == 0
    command = text.splitlines()[-1]
    assert command.startswith("sbatch --parsable --partition=cpu --nodes=1 --ntasks=4 --job-name=coco --exclude=n1 ")
    assert "gpu" not in command


@pytest.fixture
def run(tmp_path):
    """A run of one checkpoint, of one weight of 1000 elements."""
    folder = tmp_path / "a_run" / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text('{"files": []}')
    weights = {"zero_stage": 3, "fp32_flat_groups": [torch.zeros(1000)], "optimizer_state_dict": {"state": {}}}
    torch.save({"optimizer_state_dict": weights}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    shapes = {"param_shapes": [{"model.weight": torch.Size([1000])}], "buffer_names": [], "module": {}}
    torch.save(shapes, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return tmp_path / "a_run"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("options", "arguments", "problem"),
    [
        ([], ["RUN", "--out", "RUN"], "exists and is no empty folder; choose a new one"),
        ([], ["none", "--out", "w"], "none: no such folder; name the folder of a run"),
        ([], ["EMPTY", "--out", "w"], "has no good checkpoint in"),
        ([], ["RUN", "--out", "w", "--tag", "step_00000009"], "--tag step_00000009: no such checkpoint"),
        ([], ["RUN", "--out", FULL / "w"], "the weights need 0.000 GB, 0.000 GB are free"),
        ([], ["RUN"], "the following arguments are required: --out"),
        ([], ["RUN", "--out", "w", "--dtyp", "fp16"], "unrecognized arguments: --dtyp fp16"),
        ([], ["RUN", "--out", "w", "--jobs", "0"], "--jobs 0: at least 1 is needed"),
        (["--nodes", "2"], ["RUN", "--out", "w"], "--nodes 2: export runs on 1 node"),
        (["--ranks-per-node", "2"], ["RUN", "--out", "w"], "--ranks-per-node 2: export runs as one process"),
        (["--grace", "60"], ["RUN", "--out", "w"], "--grace 60: export is not signalled to save"),
        (["--chain", "2"], ["RUN", "--out", "w"], "--chain 2: export is requeued before its time limit by itself"),
        (["--time", "soon"], ["RUN", "--out", "w"], "--time soon: MINUTES"),
    ],
)
def test_an_export_that_would_fail_is_refused(checked, run, tmp_path, options, arguments, problem):
    (tmp_path / "empty").mkdir()
    paths = {"RUN": run, "EMPTY": tmp_path / "empty", "w": tmp_path / "w"}
    refused(checked(*options, "export", *[paths.get(word, word) for word in arguments]), problem)


@pytest.mark.integration
def test_an_export_may_wait_for_the_run_that_it_exports(checked, run, tmp_path):
    assert checked("--dry-run", "export", run, "--out", tmp_path / "w")[0] == 0
    later = ("--dry-run", "--dependency", "afterok:7", "export", tmp_path / "not_yet", "--out", tmp_path / "w")
    status, text = checked(*later)
    assert status == 0
    assert "note: nothing to export yet" in text
    assert "--dependency=afterok:7" in text


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["coco", "--src", "none", "--out", "o"], "--src none: no such folder"),
        (["webp", "--src", "SOURCE", "--out", "o"], "argument format: invalid choice: 'webp'"),
        (["coco", "--src", "SOURCE", "--out", "SOURCE"], "exists; choose a new folder or give --overwrite"),
        (["coco", "--src", "SOURCE", "--out", FULL / "o"], "GB, 0.000 GB are free; make room, choose another folder"),
        (["coco", "--src", "SOURCE"], "--out: not given; name the folder of the shards"),
        (["coco", "--src", "SOURCE", "--out", "gs://b/o"], "--out gs://b/o: its package is not installed"),
        (["coco", "--src", "SOURCE", "--out", "o", "--quality", "0"], "--quality 0: 1 to 95 is needed"),
    ],
)
def test_a_conversion_that_would_fail_is_refused(checked, source, tmp_path, arguments, problem):
    paths = {"SOURCE": source, "o": tmp_path / "o"}
    refused(checked("prepare_shards", *[paths.get(word, word) for word in arguments]), problem)


@pytest.mark.integration
def test_a_conversions_source_is_reported_as_the_room_it_needs(checked, tmp_path):
    source = tmp_path / "big"
    source.mkdir()
    with (source / "images.bin").open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).free + 10**12)
    words = ("prepare_shards", "coco", "--src", source, "--out", tmp_path / "o")
    refused(checked(*words), "the source has ", "GB are free; make room, choose another folder, or give --max-side")
    status, text = checked("--dry-run", *words, "--max-side", "384")  # who knows how much that leaves
    assert status == 0
    assert "note: --out" in text


@pytest.mark.integration
def test_a_script_of_bash_env_that_prints_changes_no_setting_of_the_site(tmp_path, monkeypatch):
    prints = tmp_path / "prints.sh"
    prints.write_text("echo a banner; printf 'without an end'\n")
    monkeypatch.setenv("BASH_ENV", str(prints))
    path = tmp_path / "site.env"
    path.write_text("GPUS_PER_NODE=8\nSBATCH_OPTIONS=(--partition=x '--comment=two words')\necho a greeting\n")
    assert read_site(path) == Site(8, ["--partition=x", "--comment=two words"])
