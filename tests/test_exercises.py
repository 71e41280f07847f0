"""Every exercise of the course: its solution passes, plausible wrong answers fail, and nothing is given away."""
import ast, importlib.util, inspect, json, multiprocessing, subprocess, sys, textwrap
from pathlib import Path

import pytest

from ftcourse import exercises as E

WRONG_FILES = sorted((Path(__file__).parent / "wrong").glob("*.py"))
KEYS = E.known_keys()


def _wrong():
    "key -> wrong answers, from tests/wrong/*.py."
    found = {}
    for file in WRONG_FILES:
        spec = importlib.util.spec_from_file_location(f"wrong_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.update({k: (file.name, v) for k, v in module.WRONG.items()})
    return found


@pytest.fixture(scope="session")
def wrong(): return _wrong()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FTCOURSE_HOME", str(tmp_path))
    E._shown.clear(), E._hints_given.clear()
    return tmp_path


def _secrets(solution):
    "Lines that a failure must not show: the statements of a solution that is a function, else its repr."
    if not callable(solution): return [repr(solution)] if len(repr(solution)) > 3 else []
    tree = ast.parse(textwrap.dedent(inspect.getsource(solution)))
    return [s for n in ast.walk(tree) if isinstance(n, ast.stmt) and not isinstance(n, ast.FunctionDef) and len(s := ast.unparse(n)) > 8]


# --- all exercises --------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", KEYS)
def test_solution_passes(key, capsys):
    assert E.check(key, E.solution(key)), capsys.readouterr().out
    assert not E.solved(), "the course's own solution must not count as solved"


@pytest.mark.parametrize("key", KEYS)
def test_wrong_answers_fail_and_give_nothing_away(key, wrong, capsys):
    assert key in wrong, f"no wrong answers for {key} in tests/wrong"
    file, answers = wrong[key]
    assert len(answers) >= 2, f"{file}: {key} needs two plausible wrong answers at least"
    solution = E.find(key).solution
    for n, answer in enumerate(answers):
        assert not E.check(key, answer), f"{file}: {key}: wrong answer {n} passes"
        said = capsys.readouterr().out
        assert "input:" in said and ("error:" in said or "expected:" in said and "got:" in said)
        leaks = [s for s in _secrets(solution) if s in said.replace(f"got:      {answer!r}", "")]
        assert not leaks, f"{file}: {key}: wrong answer {n} is told the solution: {leaks}"


@pytest.mark.parametrize("key", KEYS)
def test_has_hints_and_a_question(key):
    e = E.find(key)
    assert len(e.question) > 20 and e.hints and all(len(h) > 5 for h in e.hints)
    assert not any(s in h for s in _secrets(e.solution) for h in e.hints), "a hint is the solution"


def test_wrong_answers_belong_to_exercises(wrong): assert not set(wrong) - set(KEYS)


def test_keys_are_unique_and_named_after_their_module():
    root = Path(E.__file__).parent
    import re
    seen = [k for f in root.rglob("*.py") for k in re.findall(r'^@exercise\(\s*["\']([^"\']+)', f.read_text(), flags=re.M)]
    assert len(seen) == len(set(seen))
    assert all(module.split(".")[-1] == key.split(".")[0] for key, module in KEYS.items())


# --- check, hint, solution ------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["x", "", "exercises.99", "exercise.1", "../etc", 7, None])
def test_unknown_keys_list_the_known(key):
    with pytest.raises(ValueError, match="exercises.1") as e: E.check(key, 1)
    assert repr(key) in str(e.value)


def test_close_key_is_suggested():
    with pytest.raises(ValueError, match="Did you mean 'exercises.1'"): E.hint("exercise.1")


def test_error_in_answer_is_a_case(capsys):
    def answer(probs): return 1 / len(probs) + probs[7]
    assert not E.check("exercises.1", answer)
    said = capsys.readouterr().out
    assert "[0.5, 0.25]" in said and "IndexError" in said and "Traceback" not in said


@pytest.mark.parametrize("answer", [None, 3, "text", [], lambda: 0, lambda *a: None, lambda p: float("nan"), lambda p: p, print, dict, object()])
def test_any_answer_is_a_case_not_a_crash(answer, capsys):
    assert E.check("exercises.1", answer) is False
    assert "input:" in capsys.readouterr().out


def test_an_answer_whose_repr_fails(capsys):
    class Bad:
        def __repr__(self): return "bad\n" * 10_000
        def __eq__(self, other): return False
    assert E.check("exercises.1", lambda p: Bad()) is False
    assert len(capsys.readouterr().out) < 1000


def test_value_answers_are_not_shown(capsys):
    @E.exercise("mine.9", "What is seven times six, in digits?", hints=["Add seven six times."], solution=421)
    def _check(answer): yield "7 * 6", 421, answer
    try:
        assert not E.check("mine.9", 13)
        assert "421" not in capsys.readouterr().out
    finally: del E._registered["mine.9"]


def test_a_checker_without_cases_is_an_error():
    e = E.Exercise("a.1", "", (), None, lambda answer: iter(()))
    with pytest.raises(ValueError, match="no case"): E.first_failure(e, 1)


def test_hints_come_one_at_a_time(capsys):
    for _ in range(4): E.hint("exercises.1")
    lines = capsys.readouterr().out.splitlines()
    assert [l.split(":")[0] for l in lines[:3]] == [f"exercises.1, hint {n} of 3" for n in (1, 2, 3)] and "no more hints" in lines[3]


def test_solution_is_shown_and_given_back(capsys):
    answer = E.solution("exercises.1")
    assert "math.log(p)" in capsys.readouterr().out and answer([1.0]) == 0


def test_keys_are_checked():
    with pytest.raises(ValueError, match="lora.1"): E.exercise("Lora 1", "?")


# --- difference -----------------------------------------------------------------------------------------
def test_difference_on_tensors():
    import numpy as np, torch
    assert E.difference(torch.tensor([1.0, 2.0]), [1.0, 2.0]) is None
    assert E.difference([1, 2], np.array([1, 2])) is None
    assert E.difference(torch.tensor(3.0, requires_grad=True), 3.0) is None
    assert E.difference(torch.tensor([[1.0]]), 1.0) is not None  # another shape
    assert E.difference(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), [1.0, 2.0]) is None
    assert "[1][0]" in E.difference([[1], [2]], torch.tensor([[1], [3]]))


@pytest.mark.parametrize("a, b, same", [
    (1.0, 1.0 + 1e-7, True), (1.0, 1.0 + 1e-5, False), (1e9, 1e9 + 1, True), (0.0, 1e-7, True), (0, False, True), (1, "1", False),
    ([1], [1, 2], False), ({"a": 1}, {"a": 1, "b": 2}, False), ({"a": [1.0]}, {"a": (1.0,)}, True), (None, 0, False), (None, None, True),
    ({1, 2}, {2, 1}, True), ("a", "b", False), (float("inf"), float("inf"), True), (float("inf"), 1e308, False), ([], {}, False)])
def test_difference_on_values(a, b, same):
    assert (E.difference(a, b) is None) is same
    assert (E.difference(b, a) is None) is same


# --- progress -------------------------------------------------------------------------------------------
def _solve(home, key):
    import os
    os.environ["FTCOURSE_HOME"] = str(home)
    E._record(key)


def test_progress_counts(home):
    E.check("exercises.1", lambda probs: sum(map(__import__("math").log, probs)))
    row = next(r for r in E.progress() if r["chapter"] == "exercises")
    assert (row["solved"], row["total"]) == (1, 2) and row["keys"]["exercises.2"] is None
    assert json.loads(json.dumps(E.progress())) == E.progress()


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"{", b"null\n[]\n3\n", b'{"key": 3}\n', b"[" * 100_000, b'{"key": "exercises.1"'])
def test_damaged_file(home, damage):
    E._record("exercises.2")
    with open(home / "progress.jsonl", "ab") as f: f.write(damage)
    E._record("trees.1")
    assert set(E.solved()) == {"exercises.2", "trees.1"}


def test_many_writers_lose_nothing(home):
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_solve, args=(home, f"many.{n}")) for n in range(24)]
    for j in jobs: j.start()
    for j in jobs: j.join()
    assert set(E.solved()) == {f"many.{n}" for n in range(24)}


def test_unwritable_home_is_said_and_no_error(home, monkeypatch, capsys):
    (home / "file").write_text("not a folder")
    monkeypatch.setenv("FTCOURSE_HOME", str(home / "file" / "x"))
    assert E.check("exercises.2", 7.389) and "Progress is not kept" in capsys.readouterr().out
    assert E.solved() == {}


def test_progress_imports_no_chapter_and_no_network():
    code = ("import sys, ftcourse.exercises as E; E.progress(); E.hint('exercises.1'); E.check('exercises.1', len);"
            "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'socket', 'ssl', 'http', 'urllib.request') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
