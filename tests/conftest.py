"""Says by name which tests were not run, so that none passes by being left out."""

import pytest

from tests import distributed  # noqa: F401  # hides GPUs before torch is imported


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.write_line(f"not run: {report.nodeid} ({reason})")
    for item in terminalreporter.stats.get("deselected", []):
        if item.get_closest_marker("slow"):
            terminalreporter.write_line(f"not run: {item.nodeid} (slow; `make test-all` runs it)")
