"""Every named breakage is noticed by its test."""
import subprocess, sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_breakage_is_noticed():
    done = subprocess.run([sys.executable, Path(__file__).with_name("sabotage.py")], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
