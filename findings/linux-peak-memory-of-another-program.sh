#!/usr/bin/env bash
# CPython 3.11 on Linux 6, psutil 7.2.2: ru_maxrss of a program that has just been started is its parent's peak.
#
# One would guess: resource.getrusage(RUSAGE_SELF).ru_maxrss, which memory reports and benchmarks print as "peak memory", is the most
#   that this program has held since it began; exec() replaces all memory, so it begins small.
# What happens: exec() carries the figure over from the memory that it replaces. subprocess starts programs by vfork(), so that is
#   the parent's own memory: a child of a parent with a peak of 600 MiB says 600 MiB before it has done anything, and for ever.
# Seen: parent 611 MiB at its peak, given back since; child 611 MiB by ru_maxrss, 12 MiB by psutil and by VmHWM of /proc/self/status.
# What follows: a limit or an estimate that is compared with ru_maxrss is compared with whoever started the program, such as a test
#   runner. VmHWM is the program's own peak; psutil has the present value only.
set -euo pipefail
[ "$(uname -s)" = Linux ] || exit 77
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet psutil==7.2.2
"$work/venv/bin/python" - <<'PYTHON'
import resource
import subprocess
import sys

MIB = 1024 * 1024
own = bytearray(600 * MIB)
own[::4096] = b"x" * len(own[::4096])
del own

child = """
import resource, psutil
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, psutil.Process().memory_info().rss >> 20, int(peak.split()[1]) >> 10)
"""
done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
said, now, peak = map(int, done.stdout.split())
parent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
print(f"parent: {parent} MiB at its peak; child: {said} MiB by ru_maxrss, {now} MiB by psutil, {peak} MiB by VmHWM")
assert now <= peak < 100, "the child is larger than expected"
assert said >= 600, "ru_maxrss is the program's own by now"
PYTHON
