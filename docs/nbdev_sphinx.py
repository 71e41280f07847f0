"""A Sphinx extension that reads nbdev notebooks as they are.

It obeys and hides `#|` directives, links `backticked` names to the reference, turns the generated line "Open in Colab"
into a button, adds the table of contents to the home page, writes one reference page for each module from `_modidx.py`,
and turns docments (comments beside parameters) into parameter lists.
"""
import ast, json, re
from pathlib import Path

import yaml

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$")
DROPPED = {"hide", "default_exp"}  # cells with one of these are left out
CALLOUT = re.compile(r"^(:{3,})\s*\{\s*\.callout-(\w+)([^}]*)\}\s*$")
COLAB = re.compile(r"^\[Open in Colab\]\((https://colab\.research\.google\.com/[^)\s]+)\)\s*$", re.M)
NOT_PROSE = re.compile(r"(^\s*```.*?^\s*```\s*$|^\s*~~~.*?^\s*~~~\s*$|<pre.*?</pre>|\$\$.*?\$\$|\[[^\]]*\]\([^)]*\)|^\#+ [^\n]*)", re.M | re.S)


# --- cells ----------------------------------------------------------------------------------------------
def directives(source):
    "The leading `#|` lines of a cell as a dict, and the rest of its source."
    found, lines = {}, source.splitlines()
    while lines and (m := DIRECTIVE.match(lines[0])):
        found[m[1]] = m[2].strip().strip("\"'")
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def callouts(source):
    "Quarto's callouts as MyST admonitions; fenced code is left alone."
    out, fence, lines, i = [], None, source.splitlines(), 0
    while i < len(lines):
        line = lines[i]
        if m := re.match(r"^\s*(```+|~~~+)", line): fence = None if fence and m[1].startswith(fence) else (fence or m[1])
        m = None if fence else CALLOUT.match(line)
        if not m: out.append(line)
        else:
            kind, attributes = m[2], m[3]
            title = (t := re.search(r'title="([^"]*)"', attributes)) and t[1]
            after = next((j for j in range(i + 1, len(lines)) if lines[j].strip()), len(lines))
            if title is None and after < len(lines) and (h := re.match(r"^#+\s+(.*)$", lines[after])): title, i = h[1], after
            folded = " dropdown" if "collapse" in attributes else ""
            out += [f"{m[1]}{{admonition}} {title or kind.title()}", f":class: {kind}{folded}", ""]
        i += 1
    return "\n".join(out)


def link_names(source, syms):
    "`name` as a reference where the package exports it; code, maths, links and headings are left alone."
    def reference(m):
        full = syms.get(m[1].removesuffix("()"))
        return "{py:obj}`%s <%s>`" % (m[1], full) if full else m[0]
    parts = NOT_PROSE.split(source)
    return "".join(p if i % 2 else re.sub(r"(?<![`\[{}\w])`([A-Za-z_][\w.]*(?:\(\))?)`(?!`|\])", reference, p) for i, p in enumerate(parts))


def colab_button(source):
    "The generated line as a button."
    return COLAB.sub(lambda m: f"```{{button-link}} {m[1]}\n:color: primary\n:outline:\n:class: colab\nOpen in Colab\n```", source, count=1)


def markdown_cell(source, syms): return colab_button(link_names(callouts(source), syms))


def code_cell(cell):
    "A code cell with its directives obeyed, or None where it is not shown."
    found, source = directives("".join(cell["source"]))
    source = "\n".join(l for l in source.splitlines() if not re.match(r"%(matplotlib|load_ext|autoreload)\b", l)).strip("\n")
    imports_nbdev = re.fullmatch(r"(\s*(from|import)\s+nbdev[^\n]*|\s*nbdev_export\(\))+", source)
    if DROPPED & set(found) or found.get("include") == "false" or not source or imports_nbdev or source.lstrip().startswith("show_doc("): return None
    meta = dict(cell.get("metadata", {}))
    tags, shown = list(meta.get("tags", [])), meta.setdefault("mystnb", {})
    if found.get("echo") == "false": tags.append("remove-input")
    if found.get("output") == "false" or "hide_output" in found: tags.append("remove-output")
    if found.get("code-fold", "false") != "false" or "hide_input" in found:
        tags.append("hide-input")
        if "code-summary" in found: shown["code_prompt_show"] = found["code-summary"]
    if "fig-cap" in found: shown["figure"] = {"caption": found["fig-cap"]}
    if "fig-alt" in found: shown["image"] = {"alt": found["fig-alt"]}
    outputs = kept_outputs(cell.get("outputs", []), found.get("filter_stream", "").split())
    return dict(cell, source=source, outputs=outputs, metadata={**meta, "tags": tags})


def kept_outputs(outputs, unwanted=()):
    "Outputs without lines that hold an unwanted word, and without widgets, which would ask another host."
    for o in outputs:
        if o["output_type"] == "stream" and unwanted:
            o["text"] = "".join(l for l in "".join(o["text"]).splitlines(True) if not any(w in l for w in unwanted))
        if "data" in o: o["data"].pop("application/vnd.jupyter.widget-view+json", None)
    return [o for o in outputs if o.get("data", True)]


def convert(notebook, syms, toc=None):
    "The notebook as myst-nb should see it."
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown": cell = dict(cell, source=markdown_cell("".join(cell["source"]), syms))
        elif cell["cell_type"] == "code": cell = code_cell(cell)
        if cell: cells.append(cell)
    if toc: cells.append(dict(cell_type="markdown", metadata={}, source=toc, id="toc"))
    notebook["metadata"].pop("widgets", None)
    return dict(notebook, cells=cells)


# --- the package's names --------------------------------------------------------------------------------
def _modidx(path): return ast.literal_eval(Path(path).read_text(encoding="utf-8").split("d = ", 1)[1])["syms"]


def load_syms(modidx):
    "Short and full names that the package exports -> full name; nothing is imported."
    names = [(full, full[len(module) + 1:]) for module, found in _modidx(modidx).items() for full in found]
    names = [(full, short) for full, short in names if not any(part.startswith("_") for part in short.split("."))]
    result = {}
    for full, short in sorted(names, key=lambda pair: pair[1].count(".")):
        owner, _, method = short.rpartition(".")
        if owner in result: full = f"{result[owner]}.{method}"  # a patched method is documented where its class is
        result.setdefault(short, full)
        result[full] = full
    return result


def write_api(modidx, dest):
    "One page for each module that exports something, written only when it changes; their names."
    dest, pages = Path(dest), {}
    dest.mkdir(exist_ok=True)
    for module in (m for m, found in _modidx(modidx).items() if found):
        pages[module.split(".", 1)[1]] = f"# {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"
    for f in dest.glob("*.md"):
        if f.stem not in {p for p in pages}: f.unlink()
    for name, text in pages.items():
        f = dest / f"{name}.md"
        if not f.exists() or f.read_text(encoding="utf-8") != text: f.write_text(text, encoding="utf-8")
    return [f"{dest.name}/{name}" for name in pages]


def contents(toc_file, api):
    "The hidden tables of contents of the home page."
    parts = yaml.safe_load(Path(toc_file).read_text(encoding="utf-8")) + [dict(caption="Reference", chapters=api)]
    return "".join('```{toctree}\n:caption: "%s"\n:hidden:\n\n%s\n```\n\n' % (p["caption"], "\n".join(p["chapters"])) for p in parts)


# --- docstrings -----------------------------------------------------------------------------------------
def md2rst(text, syms):
    "A Markdown line as reST: `code` becomes a reference or a literal, $x$ maths, the rest is escaped."
    def part(m):
        code, maths, other = m.groups()
        if code: return ":py:obj:`%s <%s>`" % (code, syms[code.removesuffix("()")]) if code.removesuffix("()") in syms else f"``{code}``"
        return f":math:`{maths}`" if maths else re.sub(r"([\\*|]|_(?!\w))", r"\\\1", other)
    return re.sub(r"`{1,2}([^`]+)`{1,2}|\$([^$\s](?:[^$]*[^$\s])?)\$|([^`$]+|[`$])", part, text)


def _docstring(app, what, name, obj, options, lines):
    "Docstrings are Markdown; docments become Sphinx fields."
    syms = app.config.nbdev_syms
    lines[:] = [md2rst(l, syms) for l in lines]
    if what not in ("function", "method", "class"): return
    from fastcore.docments import docments
    try: found = docments(obj, full=True)
    except Exception: return  # an object without source
    if lines and lines[-1].strip(): lines.append("")
    for name, about in found.items():
        if name == "self" or not about.get("docment"): continue
        text = md2rst(" ".join(str(about["docment"]).split()), syms)
        lines.append(f":returns: {text}" if name == "return" else f":param {name}: {text}")
    lines.append("")


def _read(app, docname, source):
    if not str(app.env.doc2path(docname)).endswith(".ipynb"): return
    toc = contents(Path(app.confdir) / "toc.yml", app.config.nbdev_api) if docname == "index" else None
    source[0] = json.dumps(convert(json.loads(source[0]), app.config.nbdev_syms, toc))


def setup(app):
    app.add_config_value("nbdev_syms", {}, "env")
    app.add_config_value("nbdev_api", [], "env")
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _docstring)
    return dict(version="0.2", parallel_read_safe=True, parallel_write_safe=True)
