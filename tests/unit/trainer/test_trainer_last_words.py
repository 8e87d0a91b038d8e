"""What is told of a training process that has ended."""

import warnings

import pytest

from tunesmith_trainer.group.handover import last_words

WARNED = warnings.formatwarning("this is slow", UserWarning, "loop/assembly.py", 112, "module = Replicated(")


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("step 3\n\n", "; it said last: step 3"),
        (f"step 3\n{WARNED}", "; it said last: step 3"),
        (f"{WARNED}step 3\n  at last\n", "; it said last: at last"),
        ('Fatal Python error: Aborted\n  File "a.py", line 3 in f\n', '; it said last: File "a.py", line 3 in f'),
        (WARNED, ""),
        ("", ""),
    ],
)
def test_a_process_that_is_gone_said_last_what_is_no_warning(tmp_path, log, words):
    (tmp_path / "log").write_text(log)
    assert last_words(tmp_path / "log") == words


def test_a_process_without_a_log_said_nothing(tmp_path):
    assert last_words(tmp_path / "none") == ""
