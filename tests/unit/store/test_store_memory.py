"""What a process says of its own memory."""

import subprocess
import sys

from tunesmith_store.memory import peak_resident_bytes

MB = 1 << 20


def test_a_process_counts_its_own_memory_and_not_that_of_the_one_that_started_it():
    held = b"x" * (400 * MB)
    assert peak_resident_bytes() > 400 * MB
    program = "from tunesmith_store.memory import peak_resident_bytes; print(peak_resident_bytes())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert MB < int(told) < 200 * MB
    assert len(held) == 400 * MB


def test_what_is_free_between_what_is_held_is_given_back():
    program = """if True:
        from tunesmith_store.memory import give_back_free, own_bytes
        pieces = [bytearray(100_000) for _ in range(1000)]  # below what glibc asks the kernel for one by one
        del pieces[:-1]
        kept = own_bytes("RssAnon")
        give_back_free()
        print(kept - own_bytes("RssAnon"))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80 * MB
