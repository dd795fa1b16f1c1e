"""docs/state-machine.md is drawn from the transition table."""

from pathlib import Path

from pyx_containerd.model import diagram


def test_the_page_shows_the_table():
    page = Path(__file__).parents[2] / "docs" / "state-machine.md"
    assert f"```mermaid\n{diagram()}```" in page.read_text()
