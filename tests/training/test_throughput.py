"""Operations a second and model FLOPs utilization, against values computed by hand."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.plan import pretraining_step
from tests.tiny import tiny_config
from unimo3.distributed import World
from unimo3.kernels.args import KernelArgs
from unimo3.objectives.args import ObjectivesArgs
from unimo3.training.args import OptimArgs
from unimo3.training.metrics import StepResult, step_metrics
from unimo3.training.plan.step_trace import trace_step
from unimo3.training.throughput import Throughput, count_operations, peak_flops

FP32 = {"zero_optimization": {"stage": 3}}
BF16 = FP32 | {"bf16": {"enabled": True}}


def step():
    return pretraining_step(tiny_config(), ObjectivesArgs(), 12, KernelArgs(), OptimArgs())


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")


def test_operations_are_those_of_one_gpu_and_a_fraction_of_its_peak():
    # 300 samples a second of 2 GFLOP on 4 GPUs are 0.15 TFLOP/s of each.
    assert Throughput(2e9, 4, 312e12).metrics(300) == {"tflops": 0.15, "mfu": pytest.approx(0.15 / 312)}
    assert Throughput(2e9, 4, None).metrics(300) == {"tflops": 0.15}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
    ],
)
def test_the_peak_is_found_by_the_name_of_the_driver(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_an_unknown_gpu_has_no_peak():
    assert peak_flops("NVIDIA GeForce GTX 1050") is None


def test_a_run_counts_what_the_planner_counts_without_checkpointing(gpu):
    generator = torch.get_rng_state()
    counted = count_operations(step, BF16, World(0, 0, 8))
    assert torch.equal(torch.get_rng_state(), generator)
    assert counted == Throughput(trace_step(step(), torch.bfloat16, False).flops, 8, 312e12)
    assert count_operations(step, FP32, World(0, 0, 8)).peak_flops is None


def test_other_ranks_and_machines_without_gpus_count_nothing(gpu, monkeypatch):
    assert count_operations(step, BF16, World(1, 1, 8)) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert count_operations(step, BF16, World(0, 0, 8)) is None


def test_a_step_that_cannot_be_counted_is_a_warning(gpu, caplog):
    def broken():
        raise RuntimeError("this tower reads values")

    assert count_operations(broken, BF16, World(0, 0, 8)) is None
    assert "tflops and mfu are not logged" in caplog.text
    assert "this tower reads values" in caplog.text


def test_a_step_has_its_wait_for_data_and_its_operations():
    def metrics(throughput):
        result = StepResult({}, {}, num_bad=0, lr=0.1, raw_norm=1.0, was_skipped=False, step_s=2.0, data_s=0.5)
        return step_metrics(3, 64, result, {"loss": 1.0}, throughput, {})

    written = metrics(Throughput(1e12, 2, 100e12))
    assert (written["pairs_per_s"], written["step_s"], written["data_s"]) == (32, 2.0, 0.5)
    assert (written["tflops"], written["mfu"]) == (16, 0.16)
    assert {"tflops", "mfu"}.isdisjoint(metrics(None))


def test_gpu_memory_is_the_peak_since_the_last_line(gpu, monkeypatch):
    from unimo3.training import trainer
    from unimo3.training.args import TrainingArgs
    from unimo3.training.progress import StepProgress

    peak = [7]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 3))
    written = []
    run = SimpleNamespace(num_bad_samples=0, num_skipped=0, metrics=SimpleNamespace(write=written.append))
    run.data_metrics = dict
    args, progress = TrainingArgs(steps=9), StepProgress(9, 0, 2, rank=0)
    one = SimpleNamespace(run=run, training_args=args, progress=progress, throughput=None)
    result = StepResult({}, {}, num_bad=0, lr=0.1, raw_norm=1.0, was_skipped=False, step_s=1.0, data_s=0.0)
    for run.step in (2, 3):
        trainer.Trainer.log_step(one, result, {"loss": 1.0})
    assert [record["memory_bytes"] for record in written] == [7, 3]
