"""What the numbers of a benchmark depend on: the machine, and what else it was doing."""

import os
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

import psutil

PROJECT = Path(__file__).resolve().parent.parent


class Fact(NamedTuple):
    """A line of a report's header."""

    name: str
    value: str


def describe_machine() -> list[Fact]:
    """The hardware and how busy it is."""
    return [
        Fact("CPU", cpu_name()),
        Fact("cores", str(len(os.sched_getaffinity(0)))),
        Fact("memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"),
        Fact("kernel", platform.release()),
        Fact("load before (1, 5, 15 minutes)", load_average()),
    ]


def cpu_name() -> str:
    """As the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load_average() -> str:
    """Of the last 1, 5 and 15 minutes."""
    return ", ".join(f"{value:.1f}" for value in os.getloadavg())


def commit() -> str:
    """Of the working tree; empty where tpserve is installed without one."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    # An installed package may lie in a virtual environment inside of somebody else's repository.
    return asked.stdout.strip() if (PROJECT / ".git").exists() else ""


def seconds_of_others() -> float:
    """Processor time that neither this process nor one it started has used, since some time ago."""
    machine = psutil.cpu_times()
    busy = sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice
    this = psutil.Process()
    own = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return busy - sum(times.user + times.system for times in own)
