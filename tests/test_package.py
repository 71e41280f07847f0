"""The wheel: what is in it, and that it works where nothing of the checkout is."""
import json, os, re, zipfile

import pytest

from helpers import run


@pytest.mark.slow
def test_wheel_holds_package_and_sets(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("ftcourse/py.typed", "ftcourse/cli.py", "ftcourse/_sets/emojibot/", "ftcourse/_sets/emojibot/CARD.md"):
        assert any(n.startswith(part) for n in names), part
    assert not [n for n in names if n.startswith(("tests/", "nbs/", "tools/", "data/"))]
    sets = sum(i.compress_size for i in zipfile.ZipFile(wheel).infolist() if "/_sets/" in i.filename)
    assert sets <= 2_000_000, f"the sets take {sets} bytes of the wheel"


@pytest.mark.slow
def test_wheel_works_in_a_bare_venv(bare_python, tmp_path):
    "Import, command line and one fine-tune work, and no development tool came along."
    installed = {p["name"].lower() for p in json.loads(run(bare_python, "-m", "pip", "list", "--format=json"))}
    assert not installed & {"nbdev", "fastcore", "pytest", "trl", "sphinx"}
    env, command = {**os.environ, "FTCOURSE_HOME": str(tmp_path / "home")}, bare_python.with_name("ftcourse")
    assert re.search(r"\bsft\b", run(command, "--help", cwd=tmp_path, env=env))
    rows = [dict(prompt=f"{i} plus one is", completion=f" {i + 1}") for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run(command, "sft", "rows.jsonl", "--model", "tiny", "--out", "run", "--max-steps", "2", cwd=tmp_path, env=env)
    code = "from ftcourse import load; m, t = load('run'); from ftcourse.data.sets import load_set; print(type(m).__name__, len(load_set('emojibot', 'test')))"
    assert "200" in run(bare_python, "-c", code, cwd=tmp_path, env=env)
