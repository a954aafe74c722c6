"""What keeps a box: work of kernels, terminals and GPUs. Open servers, notebooks and browsers do not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tasks.box_servers import PEOPLE_ENV, Running, Server
from tasks.box_work import Gauge, Meter, Notices
from tasks.contract import Exit, Progress, Watch
from tasks.watch import Activity, Sight, View, advance, decide

Times = namedtuple("Times", "user system children_user children_system")
Io = namedtuple("Io", "read_chars write_chars")
WATCH = Watch(idle_s=900.0, stall_floor_s=900.0, tick_s=1.0)


class Kernel:
    """A process as the gauge reads it."""

    def __init__(self, pid: int = 1) -> None:
        self.pid, self.cpu_s, self.children_s, self.io = pid, 1.0, 0.0, 10_000

    @contextmanager
    def oneshot(self):
        yield

    def create_time(self) -> float:
        return 5.0

    def cpu_times(self) -> Times:
        return Times(self.cpu_s, 0.0, self.children_s, 0.0)

    def io_counters(self) -> Io:
        return Io(self.io, 0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.gpu = 0.0


def gauge(clock: Clock) -> Gauge:
    return Gauge(WATCH, gpu_use=lambda: clock.gpu, now=lambda: clock.now)


def pass_time(clock: Clock, seen: Gauge, kernel: Kernel, seconds: int, *, cpu: float = 0.0, io: float = 0.0) -> None:
    """Half a second at a time, with so much of a core and so many bytes a second."""
    for _ in range(2 * seconds):
        clock.now += 0.5
        kernel.cpu_s += cpu / 2
        kernel.io += int(io / 2)
        seen.look([kernel])


def test_a_kernel_that_waits_for_its_next_cell_is_no_work() -> None:
    clock, kernel = Clock(), Kernel()
    seen = gauge(clock)
    pass_time(clock, seen, kernel, 10)
    began, quiet_s = seen.signs, seen.quiet_s
    pass_time(clock, seen, kernel, 1200, cpu=0.02, io=2000)  # several times what an idle kernel was seen to use
    assert (seen.signs, seen.quiet_s - quiet_s) == (began, 1200)


def test_a_clock_in_a_forgotten_terminal_is_no_work() -> None:
    """`top` was seen to read 7.4 kB a second with 0.1 % of a core."""
    clock, kernel = Clock(), Kernel()
    seen = gauge(clock)
    pass_time(clock, seen, kernel, 10)
    began = seen.signs
    pass_time(clock, seen, kernel, 1200, cpu=0.01, io=20_000)
    assert seen.signs == began


@pytest.mark.parametrize(("cpu", "io"), [(0.5, 0.0), (0.0, 1e6), (0.06, 0.0)])
def test_a_kernel_that_computes_or_moves_bytes_is_work(cpu: float, io: float) -> None:
    clock, kernel = Clock(), Kernel()
    seen = gauge(clock)
    pass_time(clock, seen, kernel, 100)
    before = seen.signs
    pass_time(clock, seen, kernel, 60, cpu=cpu, io=io)
    assert seen.signs - before == 12 and seen.quiet_s < 10  # once a window of five seconds


def test_a_gpu_that_computes_is_work_whatever_the_processor_does() -> None:
    clock, kernel = Clock(), Kernel()
    seen = gauge(clock)
    pass_time(clock, seen, kernel, 100)
    clock.gpu = 0.5
    pass_time(clock, seen, kernel, 5)
    assert seen.quiet_s == 0
    clock.gpu = 0.01
    pass_time(clock, seen, kernel, 50)
    assert seen.quiet_s == 50


def test_commands_of_a_terminal_count_though_each_is_gone_before_anybody_looks() -> None:
    clock, shell = Clock(), Kernel()
    seen = gauge(clock)
    pass_time(clock, seen, shell, 60)
    for _ in range(60):
        shell.children_s += 0.4
        pass_time(clock, seen, shell, 1)
    assert seen.quiet_s < 10


def test_sums_never_fall_when_processes_go_and_come() -> None:
    meter, first, second = Meter(), Kernel(1), Kernel(2)
    totals = [meter.read(processes).cpu_s for processes in ([first], [first, second], [second], [], [first])]
    assert totals == [1.0, 2.0, 2.0, 2.0, 3.0]


def test_of_jupyter_only_what_it_started_counts_and_of_the_chats_model_all() -> None:
    """A server that is busy by itself, as one is whose pages are open, with a child that waits."""
    wait = "s.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    busy = f"import subprocess as s, sys\n{wait}\nwhile True: pass"
    server = subprocess.Popen([sys.executable, "-c", busy])
    try:
        until = time.monotonic() + 20
        while not psutil.Process(server.pid).children() and time.monotonic() < until:
            time.sleep(0.05)
        (child,) = psutil.Process(server.pid).children()

        def counted(name: str, *, counts: bool = False) -> set[int]:
            running = Running({name: Server(name, server, lambda: True, counts=counts)})
            return {process.pid for process in running.processes()}

        assert counted("jupyter") == {child.pid}
        assert counted("tensorboard") == set()
        assert counted("model", counts=True) == {server.pid, child.pid}
    finally:
        for process in [*psutil.Process(server.pid).children(), psutil.Process(server.pid)]:
            process.kill()
        server.wait()


def test_what_left_its_terminal_is_work_as_well(tmp_path) -> None:
    """A job of tmux or nohup descends from nobody here: it is known by its environment."""
    running = Running()
    leave = "import subprocess as s, sys; s.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    wait = "import os, time; open(os.environ['PID'], 'w').write(str(os.getpid())); time.sleep(60)"
    left = []
    for name, mark in (("mine", running.mark), ("other", "of another box")):
        env = {**os.environ, PEOPLE_ENV: mark, "PID": str(tmp_path / name)}
        subprocess.run([sys.executable, "-c", leave, wait], env=env, check=True)
    try:
        until = time.monotonic() + 20
        while len(left) < 2 and time.monotonic() < until:
            left = [int(text) for name in ("mine", "other") if (text := read(tmp_path / name))]
        server = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        running.each["jupyter"] = Server("jupyter", server, lambda: True)
        assert [one.pid for one in running.processes()] == left[:1]
        server.communicate(b"\n")
    finally:
        for pid in left:
            psutil.Process(pid).kill()


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_the_supervisors_rule_ends_a_box_whose_signs_of_work_stand_still_and_no_other() -> None:
    """People think between two cells: nothing shorter than `idle` is a stall, whatever the pace before was."""

    def after(quiet_s: int) -> Exit | None:
        activity = Activity(Sight(0.0))
        for second in range(1, 60 + quiet_s):
            done = min(second, 60)
            sight = Sight(float(second), Progress("open", count=done, done=done, step_s=1.0))
            activity = advance(activity, sight, WATCH)
        return decide(View(WATCH, activity, remaining_s=1e6, attempt=1)).stop

    assert [after(300), after(890), after(910)] == [None, None, Exit.STALLED]


def test_the_end_is_told_before_it_comes_each_thing_once() -> None:
    notices = Notices(idle_s=900.0)
    told = [notices.of(left_s=left_s, quiet_s=0.0) for left_s in (3000, 601, 600, 599, 130, 119, 60)]
    assert [bool(text) for text in told] == [False, False, True, False, False, True, False]
    assert "ends in 10 min" in told[2] and "ends in 2 min" in told[5]


def test_an_idle_box_is_told_so_and_again_when_it_worked_in_between() -> None:
    notices = Notices(idle_s=900.0)
    told = [bool(notices.of(left_s=1e5, quiet_s=quiet_s)) for quiet_s in (599, 600, 700, 0, 650)]
    assert told == [False, True, False, False, True]
