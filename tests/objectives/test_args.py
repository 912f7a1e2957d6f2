"""Errors of the objectives' settings."""

from dataclasses import fields, replace

import pytest

from unimo3.objectives.args import ItcArgs, ItmArgs, MlmArgs, ObjectivesArgs


def test_hard_negatives_need_the_contrast_that_trains_their_similarities():
    (problem,) = ObjectivesArgs(itm=ItmArgs(negatives="hard"), itc=ItcArgs(weight=0.0)).validate()
    assert problem.startswith("objectives.itm.negatives: hard: ")
    assert "objectives.itc.weight: 0" in problem
    assert "give ITC a weight above 0, or set objectives.itm.negatives to random" in problem


def test_a_contrast_over_the_step_needs_a_weight():
    (problem,) = ObjectivesArgs(itc=ItcArgs(weight=0.0, over="step")).validate()
    assert problem.startswith("objectives.itc.over: step: has no effect with objectives.itc.weight: 0")
    assert "give ITC a weight above 0, or set objectives.itc.over to micro_step" in problem


@pytest.mark.parametrize(
    "settings",
    [
        ObjectivesArgs(itc=ItcArgs(over="step")),
        ObjectivesArgs(itm=ItmArgs(negatives="hard")),
        ObjectivesArgs(itm=ItmArgs(negatives="random"), itc=ItcArgs(weight=0.0)),
        ObjectivesArgs(itm=ItmArgs(weight=0.0, negatives="hard"), itc=ItcArgs(weight=0.0)),
    ],
)
def test_settings_that_fit_together_have_no_error(settings):
    assert settings.validate() == []


@pytest.mark.parametrize("name", [group.name for group in fields(ObjectivesArgs)])
def test_settings_contrast_where_the_objective_needs_other_images(name):
    alone = ObjectivesArgs(MlmArgs(0.0), ItmArgs(0.0), ItcArgs(0.0))
    alone = replace(alone, **{name: replace(getattr(alone, name), weight=1.0)})
    (objective,) = [one for one in alone.build(seed=0) if one.weight]
    assert alone.contrasts == objective.needs_other_images


def test_all_errors_are_named_together():
    errors = ObjectivesArgs(MlmArgs(-1.0, 2.0), ItmArgs(negatives="hard"), ItcArgs(weight=0.0)).validate()
    fields = {problem.split(":")[0] for problem in errors}
    assert fields == {"objectives.mlm.weight", "objectives.mlm.probability", "objectives.itm.negatives"}
