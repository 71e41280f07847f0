"""The site: links, contents and times in the fast tests; every page in a headless browser in the slow ones."""
import functools, http.server, importlib.util, json, os, re, subprocess, sys, threading
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CHAPTERS = sorted(f for f in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts)
NAMES = [f.relative_to(NBS).with_suffix("").as_posix() for f in CHAPTERS]


def _load(name):
    "A module of docs/, which is no package."
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prose(path):
    "The Markdown of a notebook, fenced code left out."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return re.sub(r"^```.*?^```", "", "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), flags=re.M | re.S)


def _links(text): return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


def _anchors(path):
    "Anchors of headings, as GitHub and the site spell them."
    heads = re.findall(r"^#+ (.+)$", _prose(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in heads}


def _title(path): return _prose(path).split("\n", 1)[0].removeprefix("# ").strip()


# --- links, contents, times -----------------------------------------------------------------------------
@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_links_of_notebooks(path):
    for url in _links(_prose(path)):
        if re.match(r"[a-z]+:", url): continue
        target, _, anchor = unquote(url).partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.is_file(), f"{path.name} links to {url}, which isn't there"
        assert file.is_relative_to(NBS), f"{path.name} links to {url}: the site holds only what is in nbs/"
        assert not anchor or anchor in _anchors(file), f"{path.name} links to {url}, but no heading has that anchor"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_texts_outside(name):
    for url in _links((ROOT / name).read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", url): assert (ROOT / url.partition("#")[0]).exists(), f"{name} links to {url}"


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_one_colab_link_to_itself(path):
    found = re.findall(r"^\[Open in Colab\]\((\S+)\)$", _prose(path), flags=re.M)
    assert len(found) == 1 and found[0].endswith(f"/nbs/{path.relative_to(NBS).as_posix()}")


def test_the_contents_name_every_chapter_once():
    import yaml
    listed = [c for part in yaml.safe_load((ROOT / "docs/toc.yml").read_text()) for c in part["chapters"]]
    assert len(listed) == len(set(listed)) and set(listed) == set(NAMES) - {"index"}


def test_the_map_names_every_chapter_in_order_with_its_times():
    import yaml
    listed = [c for part in yaml.safe_load((ROOT / "docs/toc.yml").read_text()) for c in part["chapters"]]
    rows = re.findall(r"^\| \[[^\]]+\]\(([\w/]+)\.ipynb\) \|[^|]*\| ([^|]+) \| ([^|]+) \|$", _prose(NBS / "index.ipynb"), flags=re.M)
    assert [r[0] for r in rows] == listed, "the map of the home page and docs/toc.yml name the chapters in different orders"
    for name, cpu, t4 in rows:
        said = re.search(r"CPU ([\w.]+(?: [\d.]+)?) min,\s*T4 ([\w.]+(?: [\d.]+)?) min", _prose(NBS / f"{name}.ipynb"))
        assert said and (cpu, t4) == said.groups(), f"the map says CPU {cpu} min, T4 {t4} min for {name}, the chapter says {said and said[0]!r}"


# --- the extension --------------------------------------------------------------------------------------
def test_directives_are_obeyed():
    n = _load("nbdev_sphinx")
    cell = lambda source, **more: dict(cell_type="code", metadata={}, outputs=[], source=source, **more)
    assert n.code_cell(cell("#| hide\nx")) is None and n.code_cell(cell("#| default_exp a.b")) is None and n.code_cell(cell("")) is None
    assert n.code_cell(cell("#| export\ndef f(): pass"))["source"] == "def f(): pass"
    assert n.code_cell(cell("#| code-fold: true\nx"))["metadata"]["tags"] == ["hide-input"]
    assert n.code_cell(cell("#| echo: false\nx"))["metadata"]["tags"] == ["remove-input"]
    assert n.code_cell(cell("#| fig-alt: A picture\nx"))["metadata"]["mystnb"]["image"] == {"alt": "A picture"}


def test_names_become_references():
    n = _load("nbdev_sphinx")
    syms = {"add_lora": "ftcourse.tune.lora.add_lora"}
    assert n.link_names("use `add_lora()` here", syms) == "use {py:obj}`add_lora() <ftcourse.tune.lora.add_lora>` here"
    for kept in ("```\n`add_lora`\n```", "# `add_lora`", "[`add_lora`](x.ipynb)", "`other`", "$$`add_lora`$$"): assert n.link_names(kept, syms) == kept


def test_the_colab_line_becomes_a_button():
    n = _load("nbdev_sphinx")
    made = n.colab_button("# Title\n\n[Open in Colab](https://colab.research.google.com/github/a/b)\n\nText")
    assert made.count("colab.research") == 1 and "{button-link} https://colab.research.google.com/github/a/b" in made and "[Open" not in made


def test_the_link_checker_finds_faults(tmp_path):
    check = _load("check_site").check
    (tmp_path / "a.html").write_text('<a href="b.html">b</a><a href="#x">x</a><a href="c.html#y">c</a><script src="https://cdn.example/x.js"></script><img src="data:image/png;base64,AA==">')
    (tmp_path / "c.html").write_text('<p id="z">')
    (tmp_path / "a.css").write_text("@import url('//fonts.example/f.css')")
    n, faults = check(tmp_path)
    assert n == 2 and len(faults) == 5


# --- built, in a browser --------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site built as `make docs` builds it, in a folder of its own."
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(["bash", str(ROOT / "docs/get_mathjax.sh")], check=True)
    build = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-j", "2", "-d", str(folder / "trees"), "-c", str(ROOT / "docs"), str(NBS), str(folder / "html")],
                           capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert build.returncode == 0, build.stderr[-3000:]
    return folder / "html"


@pytest.fixture(scope="session")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Visit:
    "A page in a fresh context, with everything that went wrong on it."
    def __init__(self, browser, address, width=1400, dark=False):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        self.page, self.address, self.faults = self.context.new_page(), address, []
        inside = (address, "data:", "blob:")
        self.page.on("request", lambda r: None if r.url.startswith(inside) else self.faults.append(f"asks {r.url}"))
        self.page.on("response", lambda r: self.faults.append(f"{r.status} for {r.url}") if r.status >= 400 else None)
        self.page.on("pageerror", lambda e: self.faults.append(f"script error: {e}"))
        self.page.on("console", lambda m: self.faults.append(f"console: {m.text}") if m.type == "error" else None)

    def go(self, name):
        self.page.goto(f"{self.address}/{name}", wait_until="load")
        self.page.wait_for_function("!window.MathJax || !MathJax.startup || !MathJax.startup.promise || MathJax.startup.promise.then(() => true)")
        return self.page


MATHS = """() => ({bad: [...document.querySelectorAll('mjx-merror')].map(e => e.textContent),
                  raw: [...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container') || (e.previousSibling?.textContent ?? '').endsWith('$')).map(e => e.textContent)
                      .concat([...document.querySelectorAll('article p, article li')].map(e => e.textContent).filter(t => t.includes('$$')))})"""
WIDER = """() => { const w = document.documentElement.clientWidth, scrolls = e => ['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(e).overflowX);
    const inside = e => { for (let a = e.parentElement; a; a = a.parentElement) if (scrolls(a)) return true; return false };
    return document.documentElement.scrollWidth <= w ? [] : [...document.querySelectorAll('article *')]
        .filter(e => e.getBoundingClientRect().right > w + 1 && !inside(e)).slice(0, 3).map(e => e.tagName + ': ' + e.textContent.trim().slice(0, 80)).concat(['page of ' + document.documentElement.scrollWidth]) }"""


def _pages(site):
    "Every page, and of the listings of source code the first."
    names = sorted(f.relative_to(site).as_posix() for f in site.rglob("*.html") if "_static" not in f.parts)
    listings = [n for n in names if n.startswith("_modules")]
    return [n for n in names if n not in listings[1:]]


@pytest.mark.slow
def test_links_of_the_built_site(site):
    n, faults = _load("check_site").check(site)
    assert n > len(CHAPTERS) and not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390], ids=["desk", "phone"])
def test_every_page_in_the_browser(site, address, browser, width):
    visit, wrong = Visit(browser, address, width), []
    for name in _pages(site):
        page = visit.go(name)
        maths = page.evaluate(MATHS)
        wrong += [f"{name}: {fault}" for fault in visit.faults]
        wrong += [f"{name}: bad maths {m}" for m in maths["bad"]] + [f"{name}: maths not rendered: {m[:60]}" for m in maths["raw"]]
        if not name.startswith("_modules"): wrong += [f"{name}: wider than {width}: {w}" for w in page.evaluate(WIDER)]
        visit.faults.clear()
    visit.context.close()
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_each_chapter_has_one_colab_button_its_outputs_and_no_directives(site, address, browser):
    visit = Visit(browser, address)
    for path, name in zip(CHAPTERS, NAMES):
        page = visit.go(f"{name}.html")
        urls = page.eval_on_selector_all("a[href*='colab.research']", "es => es.map(e => e.href)")
        assert len(urls) == 1 and urls[0].endswith(f"/nbs/{name}.ipynb"), f"{name}: {urls}"
        text = page.inner_text("article")
        assert "#|" not in text and "installs ftcourse where it is missing" not in text, name
        pictures = sum("image/png" in o.get("data", {}) for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", []))
        assert len(page.query_selector_all("div.cell_output img")) == pictures, f"{name}: {pictures} pictures in the notebook"
    visit.context.close()


@pytest.mark.slow
@pytest.mark.parametrize("words, page_name", [("low-rank adapters", "3_tune/lora"), ("reply_logps", "api/tune.trees"), ("near duplicates", "2_data/checks")])
def test_search(site, address, browser, words, page_name):
    visit = Visit(browser, address)
    page = visit.go(f"search.html?q={quote(words)}")
    page.wait_for_selector("#search-results ul.search li a", timeout=20_000)
    page.wait_for_function("document.querySelector('#search-results .search-summary')?.textContent.match(/found|matching/i)")
    urls = page.eval_on_selector_all("#search-results ul.search li a", "es => es.map(e => e.href)")
    assert any(page_name in u for u in urls[:10]), urls[:10]
    assert not visit.faults
    visit.context.close()


@pytest.mark.slow
def test_the_search_field_opens(address, browser):
    visit = Visit(browser, address)
    page = visit.go("index.html")
    page.keyboard.press("Control+k")
    page.wait_for_selector("dialog[open] input[name=q], .search-button__wrapper.show input[name=q]", timeout=5000)
    visit.context.close()


@pytest.mark.slow
def test_dark_mode(address, browser):
    shades = {}
    for dark in (False, True):
        visit = Visit(browser, address, dark=dark)
        page = visit.go("3_tune/lora.html")
        colours = page.evaluate("() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('article p')).color]")
        shades[dark] = [sum(map(int, re.findall(r"\d+", c)[:3])) / 3 for c in colours]
        visit.context.close()
    assert shades[False][0] > 230 and shades[False][1] < 100, shades
    assert shades[True][0] < 60 and shades[True][1] > 150, shades


@pytest.mark.slow
def test_the_home_page_fits_its_purpose(address, browser):
    visit = Visit(browser, address)
    page = visit.go("index.html")
    assert page.locator("article img").first.bounding_box()["y"] < 900, "the picture is below the first screen"
    assert page.locator("article pre").first.bounding_box()["y"] < 900
    text = page.inner_text("article")
    assert all(w in text for w in ("Learn", "Use it", "Look something up"))
    assert page.get_by_text("Look something up").bounding_box()["y"] < 900, "not all three readers find their way on the first screen"
    visit.context.close()
