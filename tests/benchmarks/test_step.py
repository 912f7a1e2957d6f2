"""The step benchmark: contestants are comparable, its metrics are what was timed, a tiny run writes its report."""

import pytest
import torch

from benchmarks import step
from benchmarks.contestants import BRIDGETOWER, CONTESTANTS, CROSS_LAYER, IN_LAYER, build, draw_batch
from benchmarks.timing import NUM_WARM_UP, Trainee, time_in_turns

SIZE = step.SIZES["tiny"]
CPU = torch.device("cpu")


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        step.main([str(word) for word in arguments])
    return end.value.code


def test_contestants_have_nearly_the_same_parameters():
    # At the size that is measured; the tiny one's position tables weigh more.
    sizes = {name: sum(p.numel() for p in build(name, step.SIZES["cpu"]).parameters()) for name in CONTESTANTS}
    for name in (IN_LAYER, CROSS_LAYER):
        assert sizes[name] == pytest.approx(sizes[BRIDGETOWER], rel=0.01)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_contestant_learns_a_batch(name):
    trainee = Trainee(build(name, SIZE), CPU)
    for group in trainee.optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(12):
        trainee.step(draw_batch(SIZE, 8, seed=0))
    assert trainee.losses[-1] < trainee.losses[0] - 0.5
    assert all(len(phases) == 3 and min(phases) > 0 for phases in trainee.seconds)


def test_bridgetower_runs_both_towers_twice_and_ours_once():
    calls = {}
    for name, towers in ((BRIDGETOWER, ("cross_modal_image_transform",)), (IN_LAYER, ("vision_tower",))):
        module, seen = build(name, SIZE), []
        for path, part in module.named_modules():
            if path.endswith(towers):
                part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        module(draw_batch(SIZE, 4, seed=0))
        calls[name] = len(seen)
    # BridgeTower maps each of the last layers of its tower, in each of its two passes.
    assert calls == {BRIDGETOWER: 2 * SIZE.fusion_layers, IN_LAYER: 1}


def test_all_take_turns_on_the_same_batches_and_warm_up_is_dropped():
    trainees = {name: Trainee(build(name, SIZE), CPU) for name in CONTESTANTS}
    drawn = []

    def batch_of(number):
        drawn.append(number)
        return draw_batch(SIZE, 4, seed=number)

    turns = {name: lambda name=name: trainees[name] for name in CONTESTANTS}
    seconds = time_in_turns(turns, batch_of, 2, "test")
    assert drawn == list(range(NUM_WARM_UP + 2))
    assert {name: len(steps) for name, steps in seconds.items()} == dict.fromkeys(CONTESTANTS, 2)
    for name, trainee in trainees.items():
        assert seconds[name] == trainee.seconds[NUM_WARM_UP:]


def test_a_ratio_is_the_median_over_rounds():
    fast, slow = [(1.0, 1.0), (1.0, 0.0), (2.0, 2.0)], [(2.0, 1.0), (4.0, 0.0), (2.0, 3.0)]
    assert step.ratios(fast, slow) == (1.5, 1.25, 4.0)


def test_a_tiny_run_writes_its_report(tmp_path, program):
    out = tmp_path / "step.md"
    program.check(0, "benchmarks.step", "--size", "tiny", "--rounds", 1, "--attention", "eager", "--out", out)
    report = out.read_text()
    for name in CONTESTANTS:
        assert f"| {name} |" in report
    assert "| in_layer | bridgetower | 1.4 |" in report
    assert "| cross_layer | in_layer | 0.95 |" in report
    assert "| processor |" in report
    assert str(tmp_path) not in report


def test_bad_arguments_are_named_together(capsys):
    assert run("--rounds", 0, "--batch", 1, *(() if torch.cuda.is_available() else ("--size", "base"))) == 78
    printed = capsys.readouterr().err
    assert "--rounds 0: at least 1" in printed
    assert "--batch 1: at least 2" in printed
