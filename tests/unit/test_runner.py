"""The hospital's task runner: a process for each message, and what becomes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# In a process of its own, which has loaded nothing yet.
TWO_MESSAGES = """
import os, sys
from contextlib import nullcontext
from client.runner import Runner
from common.learning.layers import opacus_rules

class Task:
    def __init__(self, work):
        self.work, self.failed = work, False
    def answer(self, app, on_answer):
        self.work()
        on_answer()
    def fail(self, reason):
        self.failed = True
    def kept_alive(self):
        return nullcontext()

runner = object.__new__(Runner)
runner._app, runner._stopping, runner._child = None, False, 0
plain, needy = Task(lambda: None), Task(opacus_rules)
runner._serve(plain)
assert "opacus" not in sys.modules
runner._serve(needy)
assert "opacus" in sys.modules
dying = Task(lambda: os._exit(9))
runner._serve(dying)
assert dying.failed and not plain.failed and not needy.failed
"""


def test_what_a_message_had_to_load_is_there_for_the_next() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWO_MESSAGES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
