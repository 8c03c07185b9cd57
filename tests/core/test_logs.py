"""Log lines say what their process is at."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pause_ray.core.process import about, format_trial, log_to_stderr

ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger("pause_ray")


def test_a_line_names_all_that_its_process_is_at_also_from_a_thread(caplog: pytest.LogCaptureFixture) -> None:
    log_to_stderr()
    with about(format_trial("pause_tuned every=2 #0", "1c3e52d7a9b04f68")):
        log.warning("a loss of %s %%", 50)
        with about("cell of 9 tokens"), about(""):
            thread = threading.Thread(target=lambda: log.warning("late"))
            thread.start()
            thread.join()
        with pytest.raises(ValueError, match="x"), about("cell of 7 tokens"):
            raise ValueError("x")
        log.warning("on")
    log.warning("nothing")
    trial = "trial pause_tuned every=2 #0 (1c3e52d7)"
    assert caplog.messages == [f"{trial}: a loss of 50 %", f"{trial}, cell of 9 tokens: late", f"{trial}: on", "nothing"]


def test_a_process_of_rays_writes_what_the_command_line_would_show() -> None:
    code = "from pause_ray.core.process import *; log_to_stderr(); log_to_stderr(); log.info('it begins'); log.debug('not this')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.count("INFO it begins") == 1
    assert "not this" not in done.stderr
    silent = code.replace("log_to_stderr(); ", "import logging; logging.basicConfig(format='%(message)s'); log_to_stderr(); ", 1)
    done = subprocess.run([sys.executable, "-c", silent], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "", "where somebody decided already, nothing is added"
