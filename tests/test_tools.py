"""The tools that keep the checkout in order."""
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import notebooks  # noqa: E402  after the path


def notebook(*code):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n\nPromise."), *map(nbformat.v4.new_code_cell, code)])


def test_header_is_written_once():
    path = notebooks.NBS / "3_tune" / "lora.ipynb"
    once = notebooks.with_header(notebook("x = 1"), path)
    text = nbformat.writes(once)
    assert nbformat.writes(notebooks.with_header(once, path)) == text
    assert text.count(notebooks.MARK) == 1 and once.cells[0].source.count("Open in Colab") == 1
    assert "blob/main/nbs/3_tune/lora.ipynb" in once.cells[0].source


@pytest.mark.parametrize("changed,same", [
    ("x = 2", False), ("x = 1  # a comment", True), ("import ftcourse.exercises\nx = 1", False)])
def test_stamp_sees_code_not_comments(changed, same):
    assert (notebooks.stamp(notebook("x = 1")) == notebooks.stamp(notebook(changed))) is same


def test_stamp_follows_imports(tmp_path, monkeypatch):
    package = tmp_path / "ftcourse"
    package.mkdir()
    (package / "a.py").write_text("from .b import f")
    (package / "b.py").write_text("def f():\n    'says'\n    return 1")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    nb = notebook("from ftcourse.a import f")
    before = notebooks.stamp(nb)
    (package / "b.py").write_text("def f():\n    'says it better'\n    return 1")
    assert notebooks.stamp(nb) == before
    (package / "b.py").write_text("def f():\n    'says'\n    return 2")
    assert notebooks.stamp(nb) != before


def test_stamp_follows_what_the_package_imports_late():
    "`from ftcourse import finetune` is an import of ftcourse.tune.sft."
    assert notebooks._module_file("ftcourse.finetune") == notebooks._module_file("ftcourse.tune.sft") is not None
    assert notebooks._module_file("ftcourse.nothing") is None and notebooks._module_file("torch.nn") is None
