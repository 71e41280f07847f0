"""Colab: installing there adds packages and changes none, and each notebook runs alone in an empty folder."""
import os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

from test_package import ROOT, build_wheel, run, wheel  # noqa: F401  the fixture

CONSTRAINTS = ROOT / "tests" / "colab" / "constraints.txt"


def pins(text): return {re.sub(r"[-_.]+", "-", n).lower(): v for n, v in re.findall(r"^([\w.-]+)==([\w.+!]+)", text, re.M)}


@pytest.mark.slow
def test_colab_adds_packages_and_changes_none(wheel):  # noqa: F811
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


# Colab's versions of the runtime dependencies; torch stays at the build that can be had here.
COLAB = ["transformers", "peft", "datasets", "accelerate", "numpy", "matplotlib", "typer", "rich", "tokenizers", "huggingface-hub", "pandas",
         "safetensors", "ipykernel", "ipython", "fsspec"]


@pytest.fixture(scope="session")
def colab_python(wheel, tmp_path_factory):  # noqa: F811
    "A venv with only the wheel and its runtime dependencies, at Colab's versions where they can be had here."
    folder = tmp_path_factory.mktemp("colab")
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    here = pins(CONSTRAINTS.read_text(encoding="utf-8"))
    (folder / "pins.txt").write_text("".join(f"{n}=={here[n]}\n" for n in COLAB if n in here and n not in ("ipykernel", "ipython")))
    import torch
    run(python, "-m", "pip", "install", "-q", f"torch=={torch.__version__}")
    run(python, "-m", "pip", "install", "-q", "-c", folder / "pins.txt", wheel, "nbclient", "ipykernel")
    return python


NOTEBOOKS = sorted(f for f in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "api"} & set(f.parts))
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
