"""Who works on which shard, by a clock of the test's own."""

from pipeline.ledger import ATTEMPTS, Ledger


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ledger(shards: int) -> tuple[Ledger, Clock]:
    """One that expects shards 0, 1, ..., each of which takes a to z ten seconds."""
    clock = Clock()
    made = Ledger(clock)
    made.expect(range(shards))
    return made, clock


def make(made: Ledger, clock: Clock, shard: int, worker: str) -> None:
    assert made.begin(shard, worker) == 1
    clock.now += 10
    made.end(shard, worker, made=True)


def test_all_shards_are_over_when_each_is_made_or_has_failed() -> None:
    made, clock = ledger(2)
    make(made, clock, 0, "a")
    assert not made.over
    assert made.begin(1, "a") == 1
    assert not made.over
    made.end(1, "a", made=False)
    assert made.over
    assert made.begin(1, "b") == 0
    made.expect([7])
    assert not made.over
    assert made.begin(7, "a") == 1


def test_an_idle_worker_takes_what_waits_at_another() -> None:
    made, _ = ledger(3)
    assert made.begin(0, "slow") == 1
    assert made.spare("idle") == 1
    assert made.begin(1, "slow") == 0  # when it gets that far
    assert made.begin(2, "slow") == 1


def test_a_shard_that_takes_long_is_repeated_by_one_at_a_time() -> None:
    made, clock = ledger(3)
    make(made, clock, 0, "a")
    assert made.begin(1, "slow") == 1
    clock.now += 5
    assert made.begin(2, "other") == 1
    clock.now += 9
    assert made.spare("a") is None  # 14 seconds, and the others took 10
    clock.now += 1
    assert made.spare("a") == 1
    assert made.spare("b") is None
    clock.now += 5
    assert made.spare("b") == 2
    clock.now += 24
    assert made.spare("c") is None
    clock.now += 1
    assert made.spare("c") == 1  # the later, the more have it
    made.end(1, "c", made=True)
    assert not made.is_wanted(1)
    made.end(1, "slow", made=True)  # much later
    assert made.is_wanted(2)
    made.end(2, "b", made=True)
    assert made.over


def test_without_a_finished_shard_nothing_is_late() -> None:
    made, clock = ledger(1)
    assert made.begin(0, "slow") == 1
    clock.now += 1e6
    assert made.spare("idle") is None


def test_a_failure_of_one_worker_leaves_the_shard_to_the_other() -> None:
    made, clock = ledger(2)
    make(made, clock, 0, "a")
    assert made.begin(1, "slow") == 1
    clock.now += 15
    assert made.spare("a") == 1
    made.end(1, "a", made=False)
    assert made.is_wanted(1)
    made.end(1, "slow", made=False)
    assert made.over


def test_repeats_are_no_deaths() -> None:
    made, clock = ledger(2)
    make(made, clock, 0, "a")
    assert made.begin(1, "slow") == 1
    for number in range(2 * ATTEMPTS):
        clock.now += 1000
        assert made.spare(f"worker {number}") == 1
    assert made.begin(1, "slow") == 0  # it died once, and others have the shard
    made.end(1, "worker 3", made=True)
    assert made.over


def test_a_shard_that_kills_its_workers_is_given_up_whoever_has_it() -> None:
    made, _ = ledger(2)
    assert made.begin(1, "a") == 1
    for attempt in range(2, ATTEMPTS + 1):
        assert made.begin(1, "a") == attempt
    assert made.begin(1, "a") == ATTEMPTS + 1
    assert made.begin(0, "a") == 1
    for _ in range(ATTEMPTS - 1):
        assert made.spare("a") == 0
    assert made.spare("a") is None
    assert made.over


def test_a_worker_that_was_thought_dead_and_ends_its_shard_has_made_it() -> None:
    made, _ = ledger(2)
    assert made.begin(0, "a") == 1
    assert made.begin(1, "a") == 1  # started anew
    assert made.spare("b") == 0
    made.end(0, "a", made=True)
    assert not made.is_wanted(0)
    assert made.is_wanted(1)
