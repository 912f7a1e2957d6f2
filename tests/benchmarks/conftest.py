"""A benchmark's command, whose own programs are forked from it."""

from tests.integration.conftest import program  # noqa: F401  (a fixture)
