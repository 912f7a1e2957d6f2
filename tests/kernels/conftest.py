"""Kernels are interpreted where there is no GPU; their outputs can start as NaN."""

import pytest
import torch

import tests.interpreter  # noqa: F401


@pytest.fixture
def nan_filled(monkeypatch):
    """Outputs start as NaN, so what a kernel leaves unwritten is seen."""
    empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: filled(x, x.shape))
