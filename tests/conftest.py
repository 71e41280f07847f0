"""Every test runs offline, on one thread, and on tiny models unless it says otherwise; and the wheel, built once for those that need it."""
import os, shutil, sys
from pathlib import Path

import pytest

for name, value in dict(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MPLBACKEND="Agg").items(): os.environ.setdefault(name, value)
sys.path.insert(0, str(Path(__file__).parent))

from helpers import CONSTRAINTS, ROOT, pins, run  # noqa: E402  after the path

SKIP = shutil.ignore_patterns(".git", ".venv", "_docs", "_doctrees", "runs", "dist", "build", "*.egg-info", "__pycache__", "api", "mathjax")
# Colab's versions of the runtime dependencies; torch stays at the build that can be had here.
COLAB = ["transformers", "peft", "datasets", "accelerate", "numpy", "matplotlib", "typer", "rich", "tokenizers", "huggingface-hub", "pandas", "safetensors", "fsspec"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the checkout, so that nothing is left in it."
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "copy", ignore=SKIP)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, folder / "copy")
    return next(folder.glob("ftcourse-*.whl"))


@pytest.fixture(scope="session")
def bare_python(wheel, tmp_path_factory):
    "The Python of a venv with only the wheel and its runtime dependencies, at Colab's versions where they can be had here."
    import torch
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    here = pins(CONSTRAINTS.read_text(encoding="utf-8"))
    (folder / "pins.txt").write_text("".join(f"{n}=={here[n]}\n" for n in COLAB))
    run(python, "-m", "pip", "install", "-q", f"torch=={torch.__version__}")
    run(python, "-m", "pip", "install", "-q", "-c", folder / "pins.txt", wheel)
    return python


@pytest.fixture(scope="session")
def browser():
    "Debian's Chromium, which reaches nothing but this machine."
    from playwright.sync_api import sync_playwright
    path = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(path).exists(): pytest.fail("This test needs Debian's chromium: apt-get install chromium")
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                                     "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"])
        yield chromium
        chromium.close()
