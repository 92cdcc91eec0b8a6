"""What begins before a first compile: in a process of its own, since it is once a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import logging, threading
logging.basicConfig(level=logging.DEBUG, format="%(message)s")
import torch
from torch._inductor import cpu_vec_isa
own = cpu_vec_isa.valid_vec_isa_list
from depthc.codegen.early import start_early
start_early()
assert cpu_vec_isa.valid_vec_isa_list is not own  # whoever asks now waits
found = cpu_vec_isa.valid_vec_isa_list()
for thread in threading.enumerate():
    if thread is not threading.current_thread() and thread.daemon and "run" in thread.name:
        thread.join()
assert cpu_vec_isa.valid_vec_isa_list is own  # and nothing stays
assert found == own()
print("known", len(found))
"""


@pytest.mark.thorough
@pytest.mark.skipif(torch.cuda.is_available(), reason="only without an accelerator")
def test_it_is_done_and_leaves_no_trace(tmp_path: Path) -> None:
    folders = {"TMPDIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | folders, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("known")
    assert "an early start failed" not in done.stderr
    assert list(tmp_path.rglob("*.gch")) or list(tmp_path.rglob("*.h"))  # the headers
