"""The shape of the project: one direction of imports, light imports, nothing that names a machine."""
import ast, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["exercises", "tokens", "models", "data", "tune", "align", "evals", "ship", "cli"]
ADAPTER = ("models.py", "tune")  # `load` opens an adapter's folder, inside the function: the one import to the right
MODULES = sorted(f for f in (ROOT / "ftcourse").rglob("*.py") if f.name not in ("__init__.py", "__main__.py", "_modidx.py"))


def imported_parts(file):
    "(line, part of the package) for every import of this package in `file`."
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            names = [*base, *(node.module or "").split(".")] if node.module else [*base]
            targets = [names] if len([n for n in names if n]) > 1 else [[*names, a.name] for a in node.names]
        elif isinstance(node, ast.Import): targets = [a.name.split(".") for a in node.names]
        else: continue
        for target in targets:
            if target[0] == "ftcourse" and len(target) > 1: yield node.lineno, target[1]


@pytest.mark.parametrize("file", MODULES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_go_one_way(file):
    here = ORDER.index(file.relative_to(ROOT / "ftcourse").parts[0].removesuffix(".py"))
    wrong = [f"line {line} imports {part}" for line, part in imported_parts(file) if part in ORDER and ORDER.index(part) > here and (file.name, part) != ADAPTER]
    assert not wrong, wrong


def test_every_module_has_one_chapter():
    chapters = [f for f in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "api"} & set(f.parts)]
    homes = [m[1] for f in chapters for m in re.finditer(r'"#\|\s*default_exp ([\w.]+)"', f.read_text(encoding="utf-8"))]
    assert sorted(homes) == sorted(".".join(m.relative_to(ROOT / "ftcourse").with_suffix("").parts) for m in MODULES)


@pytest.mark.parametrize("command", [["-c", "import ftcourse"], ["-m", "ftcourse", "--help"]], ids=["import", "help"])
def test_light_imports(command):
    code = f"import sys, runpy; sys.argv = ['ftcourse', *{command[1:]!r}]\n"
    code += "import ftcourse" if command[0] == "-c" else "try: runpy.run_module('ftcourse', run_name='__main__')\nexcept SystemExit: pass"
    code += "\nsys.stderr.write('HEAVY ' + ' '.join(m for m in ('torch', 'transformers', 'datasets') if m in sys.modules))"
    if command[0] == "-m": code = code.replace(repr(command[1:]), "['--help']")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr.rstrip().endswith("HEAVY"), done.stderr


def tracked_text():
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        try: yield name, (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError): pass


def test_no_machine_is_named():
    "No absolute path of a machine, no package registry's host."
    bad = re.compile(r"/root/|/work/|/home/\w+/|/tmp/tmp|pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian")
    found = [f"{name}: {m[0]}" for name, text in tracked_text() if not name.endswith("test_layout.py") for m in bad.finditer(text)]
    assert not found, found


def test_checklist_items_named_by_tests_exist():
    items = {int(n) for n in re.findall(r"^(\d+)\. ", (ROOT / "tests/checklist.md").read_text(encoding="utf-8"), re.M)}
    assert items == set(range(1, 101))
    named = {int(n) for f in (ROOT / "tests").glob("*.py") for n in re.findall(r"#\s*item (\d+)", f.read_text(encoding="utf-8"))}
    assert named <= items
