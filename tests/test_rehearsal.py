"""The rehearsal's own promises."""

from __future__ import annotations

from rehearsal import hosts


def test_tiny_model_is_what_its_sources_make() -> None:
    assert hosts.MODEL_SOURCES.read_text().strip() == hosts.model_sources(), "run '.venv/bin/python -m rehearsal train'"
