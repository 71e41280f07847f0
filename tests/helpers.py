"""What several tests share."""
import re, subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "tests" / "colab" / "constraints.txt"
NOTEBOOKS = sorted(f for f in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "api"} & set(f.relative_to(ROOT).parts))


def run(*command, **kwargs):
    "The output of a command that must succeed."
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pins(text):
    "{normal name: version} of a list of pinned requirements."
    return {re.sub(r"[-_.]+", "-", n).lower(): v for n, v in re.findall(r"^([\w.-]+)==([\w.+!]+)", text, re.M)}
