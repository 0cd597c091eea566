"""`make guards` has something to take away for every case. That the tests then fail, it says itself."""

from guards import GUARDS, ROOT, nodes_of


def test_every_case_has_a_guard_that_is_there_once() -> None:
    # A lost machine's tests are those of a lost worker.
    assert {guard.case for guard in GUARDS} == set(range(1, 47)) - {36}
    for guard in GUARDS:
        assert (ROOT / guard.file).read_text().count(guard.line) == 1, guard
        assert nodes_of(guard.case)
