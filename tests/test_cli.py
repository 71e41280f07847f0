"""The command line: light to start, plain about errors, exit codes, the same options as the functions behind it, the demo's files."""
import inspect, json, os, re, subprocess, sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ftcourse.align.objectives import METHODS
from ftcourse.cli import OTHER_PROMPTS, app, best_prompt, prompts_to_try, run_demo, sft, spread_examples

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"messages": [{"role": "user", "content": f"How was day number {i}, and the weather {i * 7 % 5}?"}, {"role": "assistant", "content": "(like)"}]} for i in range(20)]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FTCOURSE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FTCOURSE_FAST", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return file


def call(*args, **kwargs):
    done = CliRunner().invoke(app, [str(a) for a in args], **kwargs)
    assert done.exception is None or isinstance(done.exception, SystemExit), f"{args}: {done.exception!r}"
    assert "Traceback" not in done.output
    return done.exit_code, done.stdout, done.stderr


def python(*args, cwd=None, **env):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env})


# --- start ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("args", [["--help"], ["--version"], ["sft", "--help"], ["check", "--help"], ["demo", "--help"], ["ppo", "--help"], ["judge", "--help"], ["progress"]])
def test_starts_without_heavy_imports(args):
    code = ("import sys\nfrom ftcourse.cli import app\n"
            f"try: app({args!r}, prog_name='ftcourse')\nexcept SystemExit as e: assert not e.code, e.code\n"
            "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'peft', 'pandas') if m in sys.modules])")
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_is_quick():
    "The bench takes the clock on an idle machine; here other work may run beside it, so this is processor time, the best of five."
    def seconds(*args):
        before = os.times()
        assert python(*args).returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system
    empty = min(seconds("-c", "pass") for _ in range(5))
    assert min(seconds("-m", "ftcourse", "--help") for _ in range(5)) - empty < 0.4


def test_help_names_every_command():
    code, out, _ = call("--help")
    assert code == 0 and all(re.search(rf"\b{c}\b", out) for c in ("check", "sft", "chat", "demo", "progress"))


def test_version():
    from ftcourse import __version__
    assert call("--version")[1] == f"ftcourse {__version__}\n"


@pytest.mark.parametrize("args", [["nonsense"], ["check"], ["sft"], ["check", "x.jsonl", "--limit", "zero"], ["sft", "x", "--no-such-option"], ["sft", "x", "--batch-size", "0"]])
def test_wrong_usage_is_exit_code_2(args): assert call(*args)[0] == 2


# --- python -m ftcourse ---------------------------------------------------------------------------------
def test_python_m_runs_the_command_line(tmp_path):
    done = python("-m", "ftcourse", "--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("ftcourse ")


def test_a_checkout_delegates_its_tasks_on_a_bare_python(tmp_path):
    "-S: no site-packages, so neither typer nor torch can be imported; a task must run all the same. Inside a task the command line runs."
    import shutil
    package = tmp_path / "ftcourse"
    package.mkdir()
    for name in ("__init__.py", "__main__.py"): shutil.copy(ROOT / "ftcourse" / name, package / name)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "tasks.py").write_text("import sys\nTASKS = {'demo': None, 'test': None}\ndef main(argv): print('task', *argv); sys.exit(3)\n")
    done = python("-S", "-m", "ftcourse", "test", "-k", "x", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("task test -k x\n", 3)
    def reaches_the_command_line(*args, **env): return "No module named 'ftcourse.cli'" in python("-S", "-m", "ftcourse", *args, cwd=tmp_path, **env).stderr
    assert reaches_the_command_line("demo", FTCOURSE_TASK="demo")
    assert reaches_the_command_line("check")  # not a task
    (tmp_path / "settings.ini").unlink()
    assert reaches_the_command_line("test")  # not a checkout


# --- check ----------------------------------------------------------------------------------------------
def test_check(rows, tmp_path):
    code, out, _ = call("check", rows, "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] and found["n_rows"] == 20
    assert call("check", rows)[0] == 0
    (tmp_path / "other.jsonl").write_text(json.dumps(ROWS[3]) + "\n")
    assert "leak" in call("check", rows, "--json", "--against", tmp_path / "other.jsonl")[1]
    long = json.loads(call("check", rows, "--json", "--limit", 10, "--model", "tiny")[1])
    assert any("long" in f["name"] or "limit" in f["what"] for f in long["findings"])


def test_check_bad_files(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user"\n')
    code, out, _ = call("check", "bad.jsonl", "--json")
    assert code == 1 and not json.loads(out)["ok"]
    code, _, err = call("check", "missing.jsonl")
    assert code == 1 and "missing.jsonl is not a file" in err and err.count("\n") == 1


# --- sft, chat ------------------------------------------------------------------------------------------
def test_sft_has_finetunes_options_and_defaults():
    from ftcourse.tune.sft import finetune
    ours, theirs = inspect.signature(sft).parameters, inspect.signature(finetune).parameters
    assert set(theirs) - set(ours) == {"progress"} and set(ours) - set(theirs) == {"as_json"}
    for name in set(theirs) - {"model", "data", "out", "progress"}: assert ours[name].default == theirs[name].default, name


@pytest.mark.parametrize("name", METHODS)
def test_every_objective_is_a_command_with_prefers_options(name):
    from ftcourse.align.prefer import prefer
    command = next(c.callback for c in app.registered_commands if c.name == name)
    ours, theirs = inspect.signature(command).parameters, inspect.signature(prefer).parameters
    own = set(METHODS[name].parameters)
    assert set(ours) - own - {"as_json"} == set(theirs) - {"progress", "objective", "cache", "parameters"} - (set() if METHODS[name].reference else {"reference"})
    for k in set(ours) - own - {"model", "data", "out", "as_json"}: assert ours[k].default == theirs[k].default, k
    assert {k: ours[k].default for k in own} == {k: p.default for k, p in METHODS[name].parameters.items()}


def test_an_objective_from_the_shell(rows, tmp_path):
    pairs = tmp_path/"pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"number {i} is", "chosen": f" good {i}", "rejected": " bad"}) + "\n" for i in range(12)))
    code, out, err = call("rdpo", pairs, "--model", "tiny", "--out", "run", "--alpha", 0.5, "--lora-alpha", 4, "--r", 2, "--targets", "q_proj,v_proj", "--eval-data", pairs, "--json")
    assert code == 0, err
    result, config = json.loads(out), json.loads(Path("run/config.json").read_text())
    assert result["steps"] == 2 and 0 <= result["eval_accuracy"] <= 1 and config["parameters"] == {"beta": 0.1, "alpha": 0.5} and (config["r"], config["lora_alpha"]) == (2, 4)
    code, out, err = call("sft", rows, "--model", "tiny", "--out", "first", "--max-steps", 2, "--json")
    code, out, err = call("simpo", pairs, "--model", "first", "--out", "second", "--json")  # preferences on top of a tuned model
    assert code == 0, err
    for args, words in ((["kto", pairs, "--batch-size", 1], "needs 2 rows"), (["dpo", rows], "kind 'messages'"), (["dpo", pairs, "--beta", -1], "beta=-1"), (["dpo", pairs, "--reference", "later"], "reference='later'")):
        code, out, err = call(*args, "--model", "tiny", "--out", "third")
        assert code == 1 and words in err and "Traceback" not in err, err


def test_reward_and_ppo_have_their_functions_options_and_defaults():
    from ftcourse.align.ppo import PPOSettings, ppo
    from ftcourse.align.reward import train_reward
    command = lambda name: inspect.signature(next(c.callback for c in app.registered_commands if c.name == name)).parameters
    ours, theirs = command("reward"), inspect.signature(train_reward).parameters
    assert set(theirs) - set(ours) == {"progress"} and set(ours) - set(theirs) == {"as_json"}
    for k in set(theirs) - {"model", "data", "out", "progress"}: assert ours[k].default == theirs[k].default, k
    ours, theirs, settings = command("ppo"), inspect.signature(ppo).parameters, {f.name: f.default for f in fields(PPOSettings)}
    assert set(ours) - set(settings) == set(theirs) - {"prompts", "progress", "settings"} | {"data", "as_json"}
    for k in set(ours) - {"model", "data", "reward", "out", "as_json"}: assert ours[k].default == (settings[k] if k in settings else theirs[k].default), k


def test_reward_then_ppo(tmp_path):
    pairs = tmp_path/"pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"number {i % 10} is", "chosen": f" good {i}", "rejected": " bad"}) + "\n" for i in range(12)))
    code, out, err = call("reward", pairs, "--model", "tiny", "--out", "reward", "--eval-data", pairs, "--json")
    assert code == 0 and json.loads(out)["steps"] == 2 and 0 <= json.loads(out)["eval_accuracy"] <= 1, err
    small = ("--model", "tiny", "--n-updates", 2, "--n-prompts", 4, "--max-new-tokens", 5, "--targets", "q_proj,v_proj")
    code, out, err = call("ppo", pairs, "--reward", "reward/model", "--out", "run", *small)
    assert code == 0 and "2 steps" in out and "ftcourse chat run" in out, err
    assert json.loads(Path("run/config.json").read_text())["run"]["n_updates"] == 2
    Path("rules.py").write_text("def short(prompts, replies): return [-len(r) for r in replies]\n")
    code, out, err = call("ppo", pairs, "--reward", "rules.py:short", "--out", "run2", "--method", "rloo", *small, "--json")
    assert code == 0 and json.loads(out)["reward"] <= 0, err
    for reward, words in (("rules.py:long", "no function 'long'"), ("nowhere", "nowhere"), ("nofile.py:f", "nofile.py")):
        code, out, err = call("ppo", pairs, "--reward", reward, "--out", "run3", *small)
        assert code == 1 and words in err and "Traceback" not in err, err


def test_ppo_asks_each_prompt_once(tmp_path):
    from ftcourse.cli import _prompts_of
    chat = [{"role": "user", "content": "Hi"}]
    for rows, prompts in (([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}], ["a"]), ([{"messages": chat + [{"role": "assistant", "content": "x"}]}, {"messages": chat}], [chat])):
        (tmp_path/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert _prompts_of(str(tmp_path/"rows.jsonl")) == prompts
    assert len(_prompts_of("preferences")) == 1075 and _prompts_of("preferences")[0][-1]["role"] == "user"  # 25 of the set's 1,100 prompts come twice


def test_judge_then_export(tmp_path):
    file = tmp_path/"rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?", "completions": [f"yes {i}", f"no {i}"]}) + "\n" for i in range(3)))
    code, out, err = call("judge", file, "--in-terminal", "--name", "Nino", input="A\nB\n=\n")
    assert code == 0 and "3 of 3" in out, err
    code, out, err = call("judge", file, "--export", "pairs.jsonl")
    pairs = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert code == 0 and len(pairs) == 2 and {p["chosen"][-1] for p in pairs} <= {"0", "1", "2"} and all({p["chosen"][:2], p["rejected"][:2]} == {"ye", "no"} for p in pairs), err
    for args, words in (([file, "--export", "pairs.jsonl"], "pairs.jsonl"), ([file, "--in-terminal"], "--name"), (["none.jsonl"], "not a file"), ([file, "--out", "other.jsonl", "--export", "x.jsonl"], "no row has been judged")):
        code, out, err = call("judge", *args)
        assert code == 1 and words in err and "Traceback" not in err, err


def test_eval_then_compare(tmp_path):
    small = ("--tasks", "arc,gsm8k", "--limit", 3)
    code, out, err = call("eval", "tiny", *small, "--out", "a")
    assert code == 0 and "arc: acc" in out and "0 shots, no chat template" in out, err
    code, out, err = call("eval", "tiny", *small, "--out", "b", "--n-shots", 1, "--chat-template", "--json")
    assert code == 0 and json.loads(out)["arc"]["n"] == 3 and json.loads(out)["gsm8k"]["n_shots"] == 1, err
    code, out, err = call("compare", "a", "b", "--html", "pages")
    assert code == 0 and "gsm8k strict:" in out and "n_shots: 0 before, 1 after" in out and "All answers" in Path("pages/arc.html").read_text(), err
    code, out, err = call("compare", "a/arc.json", "a/arc.json", "--json")
    same = json.loads(out)["arc"]["acc"]
    assert code == 0 and (same["better"], same["worse"], same["p"], same["settings"]) == (0, 0, 1, {}), err
    call("eval", "tiny", "--tasks", "arc", "--limit", 2, "--out", "c")
    for args, words in ((["eval", "tiny", "--tasks", "nonesuch"], "mmlu"), (["eval", "tiny", *small, "--out", "a"], "--overwrite"), (["compare", "a", "nowhere"], "holds no results"), (["compare", "a", "c"], "different rows"),
                        (["compare", "a/arc.json", "a/gsm8k.json"], "no task in common")):
        code, out, err = call(*args)
        assert code == 1 and words in err and "Traceback" not in err, err


def test_judge_serves_a_page(tmp_path):
    import urllib.request
    (tmp_path/"rows.jsonl").write_text(json.dumps({"prompt": "?", "completions": ["a", "b"]}) + "\n")
    server = subprocess.Popen([sys.executable, "-u", "-m", "ftcourse", "judge", "rows.jsonl"], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        url = re.search(r"http://\S+", server.stdout.readline()).group()
        assert "Which is better?" in urllib.request.urlopen(url, timeout=20).read().decode()
    finally:
        server.terminate()
        server.wait(20)


def test_sft_then_resume_then_chat(rows):
    code, out, err = call("sft", rows, "--model", "tiny", "--out", "run", "--n-epochs", 2, "--batch-size", 4, "--targets", "q_proj,v_proj", "--dtype", "float32", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == 10 and result["loss"] > 0  # 20 rows by 4 are 5 steps, twice
    assert set(json.loads(Path("run/adapter_config.json").read_text())["target_modules"]) == {"q_proj", "v_proj"}
    code, out, err = call("sft", rows, "--model", "tiny", "--out", "run", "--n-epochs", 2, "--batch-size", 4, "--targets", "q_proj,v_proj", "--dtype", "float32", "--resume")
    assert code == 0 and "10 steps" in out, err
    code, out, _ = call("chat", "run", "--max-new-tokens", 4, input="How was day number 3?\n")
    assert code == 0 and out.count("you> ") == 2 and "bot> " in out
    code, out, _ = call("chat", "run", input="")
    assert code == 0 and "bot>" not in out


def test_chat_uses_the_system_message_of_the_training(tmp_path, monkeypatch):
    import ftcourse.models
    seen = []
    monkeypatch.setattr(ftcourse.models, "chat", lambda model, tokenizer, system, *args, **kwargs: seen.append(system))
    rows = [{"messages": [{"role": "system", "content": "Codes only"}, *r["messages"]]} for r in ROWS[:4]]
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert call("sft", "rows.jsonl", "--model", "tiny", "--out", "run", "--max-steps", 1, "--method", "full")[0] == 0
    for more in ([], ["--system", "Other"], ["--system", ""]): assert call("chat", "run", *more)[0] == 0
    assert seen == ["Codes only", "Other", None]


@pytest.mark.parametrize("args, words", [
    (["no-such-set"], "no-such-set"), (["rows.jsonl", "--dtype", "int3"], "int3"), (["rows.jsonl", "--method", "magic"], "magic"),
    (["rows.jsonl", "--targets", "nothing_here,nor_here"], "nothing_here"), (["rows.jsonl", "--out", "rows.jsonl/x"], "rows.jsonl"), (["rows.jsonl", "--max-len", 5], "max_len")])
def test_sft_errors_are_plain(rows, args, words):
    code, _, err = call("sft", *args, "--model", "tiny")
    assert code == 1 and words in err and err.startswith("ftcourse: ")


def test_debug_shows_the_traceback(rows, monkeypatch):
    monkeypatch.setenv("FTCOURSE_DEBUG", "1")
    assert isinstance(CliRunner().invoke(app, ["sft", "rows.jsonl", "--method", "magic", "--model", "tiny"]).exception, ValueError)


def test_progress_shows_what_is_solved():
    from ftcourse.exercises import known_keys
    code, out, _ = call("progress")
    assert code == 0 and f"0 of {len(known_keys())} solved" in out
    assert sum(c["total"] for c in json.loads(call("progress", "--json")[1])) == len(known_keys())


# --- demo -----------------------------------------------------------------------------------------------
def test_demo_writes_the_figures_of_the_issue():
    code, out, err = call("demo", "--out", "demo")
    assert code == 0, err
    figures = json.loads(Path("demo/figures.json").read_text())
    assert set(figures) == {"systems", "seconds", "peak_gb"} and 0.1 < figures["peak_gb"] < 4 and 0 < figures["seconds"] < 120
    assert list(figures["systems"]) == ["base", "prompt", "sft", "sft_no_system", "dpo"]
    for one in figures["systems"].values():
        assert set(one) == {"format", "acceptable", "leaked", "n", "interval"} and set(one["interval"]) == {"format", "acceptable", "leaked"}
        assert one["n"] == 6 and all(0 <= lo <= one[m] <= hi <= 1 for m, (lo, hi) in one["interval"].items())
    page = Path("demo/report.html").read_text()
    assert all(p.split()[0] in page for p in OTHER_PROMPTS) and "Prompts tried" in page
    assert str(Path.home()) not in page and os.uname().nodename not in page and os.getcwd() not in page
    for text in ("acceptable", "sft_no_system", "report.html"): assert text in out
    assert "token accuracy" in page  # the curves are those of supervised fine-tuning, which preferences don't log
    assert json.loads(call("demo", "--out", "demo", "--json")[1]).keys() == figures.keys()  # again, over the finished run


def test_the_test_set_decides_nothing(monkeypatch):
    "With every test answer turned wrong, the chosen prompt and the training stay the same."
    import ftcourse.data.sets as sets
    real = sets.load_set
    first = run_demo("a", say=lambda line: None)
    monkeypatch.setattr(sets, "load_set", lambda name, split=None: [{**r, "acceptable": ["(none)"]} for r in real(name, split)] if split == "test" else real(name, split))
    second = run_demo("b", say=lambda line: None)
    same = ("best_prompt", "prompts", "answers", "other_answers")
    assert {k: first[k] for k in same} == {k: second[k] for k in same}
    assert all(one["acceptable"] == 0 for one in second["systems"].values())


def test_examples_spread_over_the_codes():
    rows = [{"messages": [{"role": "user", "content": f"{c}{i}"}, {"role": "assistant", "content": c}]} for c in "abc" for i in range(3)]
    assert [m for m, _ in spread_examples(rows, 7)] == ["a0", "b0", "c0", "a1", "b1", "c1", "a2"]


def test_prompts_hold_no_validation_or_test_message():
    from ftcourse.data.sets import EMOJI_SYSTEM, emoji_codes, load_set
    kept = {r["message"] for r in load_set("emojibot", "test")} | {r["messages"][-2]["content"] for r in load_set("emojibot", "validation")}
    for make in prompts_to_try(load_set("emojibot", "train"), EMOJI_SYSTEM, emoji_codes()).values():
        prompt = json.dumps(make("?"), ensure_ascii=False)
        assert not [m for m in kept if f'"{m}"' in prompt or f"Message: {m}\\n" in prompt]


def test_best_prompt_by_hand():
    rows = [{"messages": [{"role": "user", "content": c}, {}], "acceptable": [c]} for c in ("(like)", "(sad)", "(tired)")]
    prompts = {"none": lambda m: "no", "always like": lambda m: "(like)", "echo": lambda m: m, "echo too": lambda m: m}
    name, shares = best_prompt(prompts, lambda ps: ps, rows, say=lambda line: None)
    assert name == "echo" and shares == {"none": 0, "always like": pytest.approx(1/3), "echo": 1, "echo too": 1}
