"""Break the code on purpose and see the test fail: one named breakage for each checklist item that is a formula or a mask.

    python tests/sabotage.py [--item N ...]

Each breakage changes one line in a copy of the package; then the item's test must fail, and it must pass without it.
Children are forked after torch and transformers are imported, so that a breakage costs a second or two.
"""
import argparse, importlib.util, os, shutil, sys, tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Breakage:
    item: int  # number in the checklist
    module: str  # file of the package that is broken
    old: str  # text of the line, found exactly once
    new: str  # what stands there instead
    test: str  # pytest's name of the test that must notice


BREAKAGES = [
]


def run_test(test, package_parent):
    "pytest's exit code for `test` with the package taken from `package_parent`, in a forked child."
    sys.stdout.flush(); sys.stderr.flush()
    child = os.fork()
    if child == 0:
        import pytest
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.path.insert(0, str(package_parent))
        for name in [m for m in sys.modules if m.split(".")[0] == "ftcourse"]: del sys.modules[name]
        importlib.invalidate_caches()
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT), str(ROOT / test)])
        import ftcourse
        right = Path(ftcourse.__file__).resolve().is_relative_to(Path(package_parent).resolve())
        os._exit(int(code) if right else 99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sabotage(breakage):
    "None where the test notices the breakage, else what went wrong."
    source = (ROOT / breakage.module).read_text(encoding="utf-8")
    if source.count(breakage.old) != 1: return f"its line is found {source.count(breakage.old)} times in {breakage.module}"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "ftcourse", Path(folder) / "ftcourse", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "data", Path(folder) / "ftcourse" / "_sets")
        (Path(folder) / breakage.module).write_text(source.replace(breakage.old, breakage.new), encoding="utf-8")
        code = run_test(breakage.test, folder)
    return None if code == 1 else f"the test should fail, pytest's exit code was {code}"


def main(items):
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    import torch, transformers, peft, datasets  # noqa: F401  imported once, shared by every fork
    torch.set_num_threads(1)
    chosen = [b for b in BREAKAGES if not items or b.item in items]
    faults = []
    for test in dict.fromkeys(b.test for b in chosen):
        if code := run_test(test, ROOT): faults.append(f"{test}: should pass unbroken, pytest's exit code was {code}")
    for b in chosen:
        fault = sabotage(b)
        print(f"item {b.item:3d}  {'MISSED' if fault else 'noticed'}  {b.module}: {b.old.strip()[:60]}  ->  {b.new.strip()[:60]}", flush=True)
        if fault: faults.append(f"item {b.item}: {b.test}: {fault}")
    print("\n".join(faults) or f"{len(chosen)} breakages, all noticed")
    return bool(faults)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--item", type=int, nargs="*", default=[])
    sys.exit(main(parser.parse_args().item))
