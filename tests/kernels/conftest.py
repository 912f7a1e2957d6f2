"""Kernels are interpreted where there is no GPU."""

import tests.interpreter  # noqa: F401
