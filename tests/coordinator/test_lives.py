"""When lost workers get successors, and when the server gives up."""

from coordinator.lives import MAX_RESTARTS, Lives
from shared.errors import WorkerLostError

LOST = WorkerLostError("worker 1 (pid 7) was killed by SIGKILL")


def ready(now: float = 0.0) -> Lives:
    lives = Lives(2.0, now)
    lives.got_ready(now + 1.0)
    return lives


def test_workers_that_never_got_ready_are_not_started_again() -> None:
    assert not Lives(60.0, 0.0).may_restart(LOST, 1.0, jobs_fault=False)


def test_more_than_a_few_losses_in_a_minute_are_too_many() -> None:
    lives = ready()
    for i in range(MAX_RESTARTS):
        assert lives.may_restart(LOST, 10.0 * i, jobs_fault=False)
        lives.got_ready(10.0 * i + 1)
    assert lives.may_restart(LOST, 60.1, jobs_fault=False), "the first was more than a minute ago"
    lives.got_ready(60.5)
    assert not lives.may_restart(LOST, 65.0, jobs_fault=False)
    assert "worker 1" in lives.reason


def test_workers_that_do_not_get_ready_are_not_started_for_ever() -> None:
    lives = ready()
    for i in range(MAX_RESTARTS):
        assert lives.may_restart(LOST, 100.0 * i, jobs_fault=False)
    assert not lives.may_restart(LOST, 1000.0, jobs_fault=False)


def test_losses_that_a_job_is_given_up_for_do_not_count() -> None:
    lives = ready()
    for i in range(10):
        assert lives.may_restart(LOST, 2.0 * i, jobs_fault=False)
        lives.got_ready(2.0 * i + 0.5)
        assert lives.may_restart(LOST, 2.0 * i + 1, jobs_fault=True)
        lives.got_ready(2.0 * i + 1.5)


def test_silence_counts_only_while_workers_are_started_again() -> None:
    lives = Lives(2.0, 0.0)
    assert not lives.overdue(0.0, 1e6), "a large model is read for the first time"
    lives.got_ready(1e6)
    assert not lives.overdue(0.0, 2e6)
    lives.may_restart(LOST, 2e6, jobs_fault=False)
    assert not lives.overdue(0.0, 2e6 + 59)
    assert lives.overdue(0.0, 2e6 + 61)
    assert not lives.overdue(2e6 + 60, 2e6 + 61), "it says how far it is"
