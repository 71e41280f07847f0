"""check_site.py DIR: every local link and #fragment of the built site resolves, and no page or style sheet loads anything from outside."""
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

NOT_LOADED = {"canonical", "search", "index", "next", "prev", "author"}  # kinds of <link> that load nothing


class Page(HTMLParser):
    "Anchors, links and loaded files of a page."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag in ("script", "img", "iframe", "source", "video") and a.get("src"): self.loads.append(a["src"])
        if tag == "link" and a.get("href") and not NOT_LOADED & set((a.get("rel") or "").split()): self.loads.append(a["href"])


def page_faults(root, file, pages):
    "What is wrong with the links of one page."
    page, name = pages[file], file.relative_to(root)
    for url in page.links + page.loads:
        s = urlsplit(url)
        if s.scheme or s.netloc:
            if url in page.loads and s.scheme != "data": yield f"{name}: loads {url}"
            continue
        target = (file.parent / unquote(s.path)).resolve() if s.path else file
        if target.is_dir(): target = target / "index.html"
        if not target.exists(): yield f"{name}: no such file {url}"
        elif s.fragment and target in pages and unquote(s.fragment) not in pages[target].ids: yield f"{name}: no such anchor {url}"


def style_faults(root, file):
    "Addresses outside that a style sheet loads."
    text = file.read_text(encoding="utf-8", errors="replace")
    return [f"{file.relative_to(root)}: loads {u}" for u in re.findall(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)", text)]


def check(root):
    "(number of pages, faults) of the site in the folder `root`."
    root = Path(root).resolve()
    files = [f for f in root.rglob("*.html") if "_static" not in f.relative_to(root).parts]
    pages = {f: Page(f.read_text(encoding="utf-8")) for f in files}
    faults = [fault for f in pages for fault in page_faults(root, f, pages)]
    return len(pages), faults + [fault for f in root.rglob("*.css") for fault in style_faults(root, f)]


if __name__ == "__main__":
    n, faults = check(sys.argv[1])
    print("\n".join([*faults, f"{n} pages checked, {len(faults)} faults"]))
    sys.exit(bool(faults) or not n)
