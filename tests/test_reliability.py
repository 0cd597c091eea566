"""docs/reliability.md: every case is there, and every test that it names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "reliability.md").read_text()
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
}


def test_every_case_has_its_row_and_its_test() -> None:
    rows = re.findall(r"^\| (\d+) \|[^|]*\|[^|]*\| ([^|]*) \|$", TEXT, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 47))
    for number, cell in rows:
        named = re.findall(r"`(\w+)`", cell)
        assert named
        assert all(re.match(rf"test_case_(\d\d_)*{int(number):02d}_", name) for name in named), cell


def test_every_named_test_exists() -> None:
    assert set(re.findall(r"`(test_\w+)`", TEXT)) <= TESTS
