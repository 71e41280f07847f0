"""Keep the notebooks in order: generated set-up cells, outputs and their stamps.

    python tools/notebooks.py headers [NAME ...]   write the set-up cell and the Colab link of each notebook
    python tools/notebooks.py outputs [NAME ...]   run the chapters whose code or imported modules changed, keep the outputs
    python tools/notebooks.py fast NAME ...        run on the fast path, keep nothing
    python tools/notebooks.py check                fail where a header, the export, the clean state or a stamp has drifted

A stamp is a hash of a notebook's code, of every ftcourse module it imports, directly or not, and of the files in
data/results that it names. Comments, docstrings and prose are left out, so that better wording asks for no new run.
"""
import ast, configparser, hashlib, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
NBS = ROOT / SETTINGS["nbs_path"]
MARK = "# Set-up, generated from settings.ini:"
SETUP = f"""#| hide
{MARK} installs {{lib}} where it is missing and changes no package that is already there.
import importlib.util, subprocess, sys, tempfile
if importlib.util.find_spec('{{lib}}') is None:
    pip = [sys.executable, '-m', 'pip']
    here = subprocess.run([*pip, 'list', '--format=freeze'], capture_output=True, text=True).stdout
    with tempfile.NamedTemporaryFile('w', suffix='.txt', delete=False) as pins: pins.write(here)
    if subprocess.run([*pip, 'install', '-q', '-c', pins.name, '{{lib}}=={{version}}']).returncode:
        raise SystemExit('{{lib}} {{version}} could not be installed beside what is here (see pip above). Without a network: '
                         'pip install PATH/TO/{{lib}}-{{version}}-py3-none-any.whl. From source: pip install git+{{git_url}}')"""


def notebooks(names=()):
    "The notebooks of the course in order, or those named (`3_tune/lora`)."
    found = sorted(f for f in NBS.rglob("*.ipynb") if not {".ipynb_checkpoints", "api"} & set(f.relative_to(NBS).parts))
    return [NBS / f"{n}.ipynb" for n in names] or found


def name_of(path): return path.relative_to(NBS).with_suffix("").as_posix()


def colab_url(path):
    base = SETTINGS["git_url"].replace("https://github.com/", "https://colab.research.google.com/github/")
    return f"{base}/blob/{SETTINGS['branch']}/{path.relative_to(ROOT).as_posix()}"


def setup_source():
    return SETUP.format(lib=SETTINGS["lib_name"], version=SETTINGS["version"], git_url=SETTINGS["git_url"])


def with_header(nb, path):
    "`nb` with its Colab link under the title and the set-up cell after the first prose cell."
    link, title = f"[Open in Colab]({colab_url(path)})", nb.cells[0]
    lines = [l for l in title.source.split("\n") if not l.startswith("[Open in Colab](")]
    rest = "\n".join(lines[1:]).strip("\n")
    title.source = f"{lines[0]}\n\n{link}\n\n{rest}"
    old = [c for c in nb.cells if c.cell_type == "code" and MARK in c.source]
    cell = old[0] if old else nbformat.v4.new_code_cell(id="setup")
    if cell.source != setup_source(): cell.source = setup_source()
    nb.cells = [title, cell] + [c for c in nb.cells[1:] if c not in old]
    nb.metadata.pop("jupytext", None)
    nb.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    return nb


def write(nb, path): path.write_text(nbformat.writes(nb, indent=1) + "\n", encoding="utf-8")


def headers(paths):
    for path in paths:
        nb = nbformat.read(path, as_version=4)
        write(with_header(nb, path), path)


# --- stamps ---------------------------------------------------------------------------------------------
def _meaning(source):
    "The syntax tree of `source` as text, without comments and docstrings."
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                node.body[0] = ast.Pass()
    return ast.dump(tree)


def _imports(source, package):
    "Names of the modules of this library that `source`, living in `package`, imports."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            module = ".".join(p for p in ([base] if node.level else []) + [node.module or ""] if p)
            yield from [module, *(f"{module}.{a.name}" for a in node.names)]


def _lazy():
    "{name: module} of what the package itself imports when it is asked for, read from its __init__.py."
    init = ROOT / SETTINGS["lib_path"] / "__init__.py"
    tree = ast.parse(init.read_text(encoding="utf-8") if init.exists() else "")
    return next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "_LAZY"), {})


def _module_file(name):
    "The file of module `name` of this library, or of the module that the package takes `name` from; None for anything else."
    package, _, rest = name.partition(".")
    if package != SETTINGS["lib_name"]: return None
    f = ROOT.joinpath(*_lazy().get(rest, name).split(".")).with_suffix(".py")
    return f if f.exists() else None


def code_of(nb):
    "The Python of a notebook, magics and shell lines left out."
    code = "\n".join(c.source for c in nb.cells if c.cell_type == "code" and MARK not in c.source)
    return re.sub(r"^[ \t]*[%!].*$", "", code, flags=re.M)


def stamp(nb):
    "Hash of the notebook's code, of every module of this library that it reaches and of the result files that it names."
    todo, seen, parts = list(_imports(code_of(nb), "")), set(), [_meaning(code_of(nb))]
    while todo:
        name = todo.pop()
        file = _module_file(name)
        if file is None or name in seen: continue
        seen.add(name)
        todo += _imports(file.read_text(encoding="utf-8"), ".".join(file.relative_to(ROOT).parts[:-1]))
    parts += [_meaning(_module_file(n).read_text(encoding="utf-8")) for n in sorted(seen)]
    parts += [f.read_text(encoding="utf-8") for f in sorted((ROOT / "data" / "results").glob("*.json")) if f.name in code_of(nb)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def stamp_of(nb): return nb.metadata.get("ftcourse", {}).get("stamp")


# --- running --------------------------------------------------------------------------------------------
def execute(path, fast=False, timeout=600):
    "Run a notebook in its own folder's copy; returns (notebook with outputs, seconds)."
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    env = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONWARNINGS="ignore")
    env.update({"FTCOURSE_FAST": "1", "OMP_NUM_THREADS": "1"} if fast else {})
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(nb, timeout=timeout, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": folder}})
        client.execute(env=env)
    return nb, time.time() - started


def outputs(paths, force=False):
    "Run each chapter whose stamp has changed and keep its outputs."
    for path in paths:
        nb = nbformat.read(path, as_version=4)
        if not force and stamp_of(nb) == stamp(nb): continue
        nb, seconds = execute(path)
        nb.metadata["ftcourse"] = {"stamp": stamp(nb)}
        for cell in nb.cells: cell.metadata.pop("execution", None)
        write(nb, path)
        clean([path])
        print(f"{name_of(path)}: {seconds:.0f} s", flush=True)


def clean(paths):
    "nbdev's clean step, one notebook at a time."
    for path in paths: subprocess.run([_tool("nbdev_clean"), "--fname", str(path)], check=True, cwd=ROOT, capture_output=True)


def _tool(name): return shutil.which(name, path=str(Path(sys.executable).parent)) or name


# --- drift ----------------------------------------------------------------------------------------------
def drift():
    "What no longer matches its source, as lines of text; empty when all is in order."
    problems = []
    for path in notebooks():
        before = path.read_text(encoding="utf-8")
        nb = nbformat.reads(before, as_version=4)
        if nbformat.writes(with_header(nbformat.reads(before, as_version=4), path), indent=1) + "\n" != before:
            problems.append(f"{name_of(path)}: the set-up cell or Colab link differs from settings.ini; run: make outputs")
        if stamp_of(nb) != stamp(nb):
            problems.append(f"{name_of(path)}: its outputs are older than its code or the modules it imports; run: make outputs")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        keep = shutil.ignore_patterns(".git", ".venv", "_docs", "_doctrees", "runs", "dist", "build", "api", "__pycache__", "mathjax")
        shutil.copytree(ROOT, copy, ignore=keep)
        for tool in ("nbdev_export", "nbdev_clean"): subprocess.run([_tool(tool)], cwd=copy, check=True, capture_output=True)
        for part, fix in (("ftcourse", "nbdev_export"), ("nbs", "nbdev_clean")):
            for f in sorted((copy / part).rglob("*")):
                here = ROOT / f.relative_to(copy)
                if f.suffix in (".py", ".ipynb") and (not here.exists() or here.read_bytes() != f.read_bytes()):
                    problems.append(f"{f.relative_to(copy)}: differs from what {fix} writes; run: {fix}")
    return problems


def main(task="check", *names):
    if task == "headers": headers(notebooks(names))
    elif task == "outputs": headers(notebooks(names)); outputs(notebooks(names))
    elif task == "fast":
        for path in notebooks(names): print(f"{name_of(path)}: {execute(path, fast=True)[1]:.0f} s on the fast path", flush=True)
    elif task == "check":
        problems = drift()
        print("\n".join(problems) or "notebooks: in order")
        sys.exit(bool(problems))
    else: sys.exit(__doc__)


if __name__ == "__main__": main(*sys.argv[1:])
