"""What a checkout can do: python -m ftcourse TASK, or make TASK. Standard library only; everything else goes into .venv."""
import hashlib, os, platform, shutil, subprocess, sys, time, venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
TORCH = "2.13.0"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # PyTorch's own builds without CUDA


def run(*command, **env):
    "Run a command at the root of the checkout; leave with its exit code where it fails."
    code = subprocess.call([str(c) for c in command], cwd=ROOT, env={**os.environ, **env})
    if code: sys.exit(code)


def tool(name): return BIN / (name + (".exe" if os.name == "nt" else ""))
def python(*args, **env): run(tool("python"), *args, **env)
def pip(*args): return subprocess.call([str(tool("python")), "-m", "pip", "install", "-q", "--disable-pip-version-check", *args], cwd=ROOT)


def install_torch():
    "The CPU build wherever there is no NVIDIA GPU: one that pip already knows of first, then PyTorch's own."
    if platform.system() == "Linux" and not shutil.which("nvidia-smi"):
        found = subprocess.run([tool("python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", f"torch=={TORCH}+cpu"],
                               cwd=ROOT, capture_output=True).returncode == 0
        if found or pip(f"torch=={TORCH}+cpu", "--index-url", CPU_WHEELS) == 0: return
        sys.exit(f"setup: no CPU build of torch {TORCH} could be installed (see pip above). Is there a network?")
    if pip(f"torch=={TORCH}"): sys.exit(f"setup: torch {TORCH} could not be installed (see pip above)")


def setup():
    "Make .venv with the pinned versions; does nothing where it is up to date."
    wanted = hashlib.sha256(b"".join((ROOT / f).read_bytes() for f in ("constraints.txt", "setup.py", "settings.ini", "tools/tasks.py"))).hexdigest()
    done = VENV / "ftcourse-setup"
    if done.exists() and done.read_text() == wanted: return
    if sys.version_info < (3, 11): sys.exit(f"setup: Python 3.11 or newer is needed, this is {platform.python_version()}")
    started = time.time()
    print("Setting up .venv (a few minutes the first time) ...", flush=True)
    if not tool("python").exists(): venv.create(VENV, with_pip=True)
    install_torch()
    if pip("-c", "constraints.txt", "-e", ".[dev]"): sys.exit("setup: pip failed, see above")
    done.write_text(wanted)
    print(f"Set up in {time.time() - started:.0f} s.", flush=True)


def demo(*args):
    "Fine-tune SmolLM2 to answer in emoji codes and compare it with its base: runs/emojibot/report.html."
    setup()
    python("-m", "ftcourse", "demo", *args, FTCOURSE_TASK="demo")


def test(*args):
    "Notebooks, package and everything that must not drift: 15 minutes at most."
    setup()
    python("tools/notebooks.py", "check")
    run(tool("nbdev_test"), "--n_workers", "2", FTCOURSE_FAST="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    python("-m", "pytest", "-n", "2", *args, OMP_NUM_THREADS="1")


def test_slow(*args):
    "Parity with other libraries, kills, two processes, the browser, Colab, sabotage."
    setup()
    python("-m", "pytest", "-m", "slow", *args)


def docs(*args):
    "Build and check the site in _docs/."
    setup()
    run("bash", "docs/build_site.sh", *args, PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")


def lab(*args):
    "Open the notebooks in JupyterLab."
    setup()
    python("-m", "jupyter", "lab", "nbs", *args)


def outputs(*args):
    "Run the chapters whose code or imported modules changed and keep their outputs."
    setup()
    python("tools/notebooks.py", "outputs", *args)


def bench(*args):
    "Side by side with peers; run it alone on an idle machine."
    setup()
    python("tests/bench/run.py", *args)


def lint(*args):
    "Ruff over everything that is not generated."
    setup()
    run(tool("ruff"), "check", *(args or ("tools", "tests", "docs", "setup.py")))


TASKS = {f.__name__.replace("_", "-"): f for f in (setup, demo, test, test_slow, docs, lab, outputs, bench, lint)}


def main(argv):
    if not argv or argv[0] not in TASKS:
        print("\n".join(f"{name:10} {f.__doc__.strip()}" for name, f in TASKS.items()))
        sys.exit(bool(argv) and argv[0] not in ("help", "-h", "--help"))
    TASKS[argv[0]](*argv[1:])


if __name__ == "__main__": main(sys.argv[1:])
