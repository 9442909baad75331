"""Prints the comparisons of the benchmarks below pytest-benchmark's table."""

from __future__ import annotations

import pytest

COMPARISONS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COMPARISONS] = []


@pytest.fixture(scope="session")
def comparisons(pytestconfig: pytest.Config) -> list[str]:
    """Lines for the end of the report."""
    return pytestconfig.stash[COMPARISONS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.stash[COMPARISONS]:
        terminalreporter.section("comparison")
        for line in config.stash[COMPARISONS]:
            terminalreporter.write_line(line)
