"""The wheel: what is in it, how light it is, and that it works where nothing of the checkout is."""
import json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIP = shutil.ignore_patterns(".git", ".venv", "_docs", "_doctrees", "runs", "dist", "build", "*.egg-info", "__pycache__", "api", "mathjax")


def run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder):
    "Build the wheel from a copy of the checkout, so that nothing is left in it."
    shutil.copytree(ROOT, folder / "copy", ignore=SKIP)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, folder / "copy")
    return next(folder.glob("ftcourse-*.whl"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory): return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_wheel_holds_package_and_sets(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("ftcourse/py.typed", "ftcourse/cli.py", "ftcourse/_sets/emojibot/", "ftcourse/_sets/emojibot/CARD.md"):
        assert any(n.startswith(part) for n in names), part
    assert not [n for n in names if n.startswith(("tests/", "nbs/", "tools/", "data/"))]
    sets = sum(i.compress_size for i in zipfile.ZipFile(wheel).infolist() if "/_sets/" in i.filename)
    assert sets <= 2_000_000, f"the sets take {sets} bytes of the wheel"


@pytest.mark.slow
def test_wheel_works_in_a_bare_venv(wheel, tmp_path):
    "Install with runtime dependencies only; import, command line and one fine-tune work; no development tool came along."
    bare = tmp_path / "venv"
    run(sys.executable, "-m", "venv", bare)
    python = bare / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "torch==2.13.0+cpu" if "+cpu" in torch_version() else "torch==2.13.0")
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
    installed = {p["name"].lower() for p in json.loads(run(python, "-m", "pip", "list", "--format=json"))}
    assert not installed & {"nbdev", "fastcore", "pytest", "trl", "sphinx"}
    env = {**os.environ, "FTCOURSE_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    assert re.search(r"\bsft\b", run(bare / "bin" / "ftcourse", "--help", cwd=tmp_path, env=env))
    rows = [dict(prompt=f"{i} plus one?", completion=f"{i + 1}") for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run(bare / "bin" / "ftcourse", "sft", "rows.jsonl", "--model", "tiny", "--out", "run", "--max-steps", "2", cwd=tmp_path, env=env)
    code = "from ftcourse import load; m, t = load('run'); from ftcourse.data.sets import load_set; print(type(m).__name__, len(load_set('emojibot', 'test')))"
    assert "200" in run(python, "-c", code, cwd=tmp_path, env=env)


def torch_version():
    import torch
    return torch.__version__
