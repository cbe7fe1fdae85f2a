"""What the launcher is asked to do, and what it passes on."""

import signal
import threading

from bigtune.launch.interrupts import Interrupts


def test_the_first_asks_workers_to_save_and_the_second_ends_them() -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert (interrupts.count, interrupts.take(), interrupts.take()) == (1, [signal.SIGTERM], [])
        signal.raise_signal(signal.SIGINT)
        assert (interrupts.count, interrupts.take()) == (2, [signal.SIGKILL])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_batch_system_that_asks_agents_first_is_no_second_time() -> None:
    with Interrupts() as interrupts:
        interrupts.elsewhere = True
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.any and interrupts.take() == [signal.SIGTERM]


def test_a_terminal_that_hangs_up_is_one_but_for_nohup() -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGHUP)
        assert interrupts.take() == [signal.SIGTERM]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupts.any
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_save_is_passed_on_and_is_no_interruption() -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGUSR1)
        assert (interrupts.count, interrupts.take()) == (0, [signal.SIGUSR1])


def test_off_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def use() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(timeout=20)
    assert seen == [before]
