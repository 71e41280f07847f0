"""The README's code runs, and every command it names exists."""
import re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def blocks(language): return [code for lang, code in BLOCKS if lang == language]


def test_python_runs(tmp_path, monkeypatch, capsys):
    "On the tiny model, for a few steps: what a reader pastes must not fail."
    import ftcourse
    monkeypatch.chdir(tmp_path)
    finetune, prefer = ftcourse.finetune, ftcourse.prefer
    monkeypatch.setattr(ftcourse, "finetune", lambda model, data: finetune("tiny", data, max_steps=2), raising=False)
    monkeypatch.setattr(ftcourse, "prefer", lambda model, data, **options: prefer(model, data, max_steps=2, **options), raising=False)
    for code in blocks("python"): exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my-emojibot" / "adapter_model.safetensors").exists()


def test_commands_exist():
    from typer.main import get_command

    from ftcourse.cli import app
    known = get_command(app).commands
    commands = [line.split() for code in blocks("sh") for line in code.splitlines() if line.startswith("ftcourse ")]
    assert commands
    for _, name, *args in commands:
        options = {o for p in known[name].params for o in p.opts}
        assert {a for a in args if a.startswith("--")} <= options, name


def test_make_targets_exist():
    tasks = subprocess.run([sys.executable, ROOT / "tools" / "tasks.py"], capture_output=True, text=True).stdout
    for target in re.findall(r"make ([\w-]+)", "\n".join(blocks("sh"))):
        assert re.search(rf"^{target}\b", tasks, re.M), target


def test_links_resolve():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text(encoding="utf-8")): assert (ROOT / target).exists(), target
