"""Colab: installing there adds packages and changes none, and each notebook runs alone in an empty folder."""
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

from helpers import CONSTRAINTS, NOTEBOOKS, ROOT, pins, run


@pytest.mark.slow
def test_colab_adds_packages_and_changes_none(wheel):
    uv = Path(sys.executable).with_name("uv")
    listed = run(uv, "pip", "compile", "-q", "--no-python-downloads", "--python-version", "3.13", "--no-header", "--no-annotate",
                 "-c", CONSTRAINTS, "-", input=f"ftcourse @ {wheel.as_uri()}\n")
    here, wanted = pins(CONSTRAINTS.read_text(encoding="utf-8")), pins(listed)
    assert len(wanted) > 30
    changed = {n: (here[n], v) for n, v in wanted.items() if n in here and here[n] != v}
    assert not changed, changed
    missing = sorted(set(wanted) - set(here) - {"ftcourse"})
    nvidia = [n for n in missing if n.startswith(("nvidia", "cuda", "triton"))]  # left out of the constraints file
    assert set(missing) - set(nvidia) == {"gguf"}, missing


@pytest.fixture(scope="session")
def colab_python(bare_python):
    "The bare venv with what runs a notebook."
    run(bare_python, "-m", "pip", "install", "-q", "nbclient", "ipykernel")
    return bare_python


ALONE = """
import sys, nbformat
from nbclient import NotebookClient
nb = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
"""


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda f: f.relative_to(ROOT / "nbs").with_suffix("").as_posix())
def test_notebook_alone(notebook, colab_python, tmp_path):
    shutil.copy(notebook, tmp_path)
    env = {**os.environ, "FTCOURSE_FAST": "1", "OMP_NUM_THREADS": "1", "FTCOURSE_HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "ignore"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([colab_python, "-c", ALONE, notebook.name], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
