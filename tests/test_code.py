"""Programs that nobody has read: pass@k by listing, every wall attacked, and verdicts that no program can change."""
import itertools, json, math, os, random, re, shutil, subprocess, sys, textwrap, threading, time
from fractions import Fraction
from pathlib import Path

import pytest

from ftcourse.data.sets import load_set
from ftcourse.evals import code as C
from ftcourse.evals.code import CodeRun, Limits, Outcome, Sandbox, SandboxError, evaluate_code, pass_at_k, program_of, read_samples, write_code

ROWS = load_set("humaneval")
GCD = "def g(a, b):\n    while a: a, b = b % a, a\n    return b\n"
TEST = "def check(candidate):\n    assert candidate(3, 7) == 1\n    assert candidate(10, 15) == 5\n"
PACKAGE = Path(C.__file__).resolve().parents[2]
SYSTEM_PYTHON = Path("/usr/bin/python3")
as_root = pytest.mark.skipif(os.getuid() != 0 or not SYSTEM_PYTHON.exists(), reason="needs root and the system's Python")


def uids():
    "Users of the sandbox's range that have processes."
    return {p.stat().st_uid for p in Path("/proc").glob("[0-9]*") if p.exists()} & set(range(61184, 65520))


@pytest.fixture(scope="module")
def sandbox():
    "With little processor time, so that loops end soon, and a long clock, so that a busy machine changes nothing."
    if not shutil.which("bwrap"): pytest.fail("These tests need Debian's bubblewrap: apt-get install bubblewrap")
    return Sandbox(Limits(cpu_seconds=1, seconds=60))


@pytest.fixture(autouse=True)
def goes_on(request):
    "After each attack an honest program still passes."
    yield
    if "sandbox" in request.fixturenames: assert request.getfixturevalue("sandbox").check(GCD, TEST, "g").passed


# --- the number -----------------------------------------------------------------------------------------
def test_pass_at_k_is_the_share_of_choices():
    # item 95
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            picks = list(itertools.combinations(range(n), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(min(p) < c for p in picks)/len(picks), abs=1e-12)
    for n, c, k in ((200, 7, 100), (1000, 3, 500), (100_000, 20, 1000)):
        assert pass_at_k(n, c, k) == pytest.approx(float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))), rel=1e-9)


@pytest.mark.parametrize("n, c, k, words", [(5, 1, 6, "k=6 with n=5"), (5, 1, 0, "k=0"), (5, 6, 1, "c=6 of n=5"), (5, -1, 1, "c=-1"), (0, 0, 1, "k=1 with n=0")])
def test_pass_at_k_refuses(n, c, k, words):
    # item 95
    with pytest.raises(ValueError, match=words): pass_at_k(n, c, k)


def test_a_run_is_a_mean_over_tasks():
    outcome = {v: Outcome(v, "", "", 0.0) for v in ("passed", "wrong", "error")}
    run = CodeRun([{}]*2, [[""]*4]*2, [[outcome[v] for v in words] for words in (["passed", "wrong", "wrong", "error"], ["wrong"]*4)])
    assert run.pass_at(1) == [pytest.approx(1/4), 0] and run.pass_at(2) == [pytest.approx(1/2), 0]  # 3 of the 6 pairs hold the first
    assert run.verdicts() == {"wrong": 6, "passed": 1, "error": 1} and list(run.verdicts())[0] == "wrong"
    with pytest.raises(ValueError, match="k=5 with n=4"): run.pass_at(5)


# --- what crosses ---------------------------------------------------------------------------------------
def test_values_cross_whole():
    rng = random.Random(0)
    def value(depth):
        kind = rng.choice(["int", "float", "str", "bool", "none", "bytes"] + ["list", "tuple", "dict", "set"]*(depth > 0))
        if kind in ("list", "tuple"): return {"list": list, "tuple": tuple}[kind](value(depth - 1) for _ in range(rng.randrange(4)))
        if kind == "dict": return {rng.choice(["a", 1, (1, "b"), None]): value(depth - 1) for _ in range(3)}
        if kind == "set": return {rng.randrange(9) for _ in range(3)}
        return {"int": rng.randrange(-10**30, 10**30), "float": rng.uniform(-1e300, 1e300), "str": "a\n\u00eb\ud800\u10d0\x00", "bool": True, "none": None, "bytes": b"\x00\xff"}[kind]
    for _ in range(300):
        x = value(3)
        assert repr(C._unpacked(json.loads(json.dumps(C._packed(x))))) == repr(x)


class Yes:
    def __eq__(self, other): return True
    __hash__ = None
class YesInt(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
class YesList(list):
    def __eq__(self, other): return True

@pytest.mark.parametrize("x", [Yes(), YesInt(3), YesList([1]), [Yes()], print, object(), range(3), 1j])
def test_nothing_crosses_that_decides_for_itself(x):
    got = C._unpacked(json.loads(json.dumps(C._packed(x))))
    assert got != 42 and got != [2] and got != [0, 1, 2] and type(got) in (int, list, object)


def test_numbers_of_system_calls_are_the_kernels():
    names = "clone shmget semget msgget socket ptrace mount add_key request_key keyctl unshare perf_event_open setns process_vm_readv process_vm_writev memfd_create bpf userfaultfd io_uring_setup clone3 pidfd_getfd".split()
    for machine, header in (("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")):
        header = Path("/usr/include")/header
        if not header.exists(): continue
        numbers = {name: int(n) for name, n in re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text())}
        _, clone, denied = C._DENIED[machine]
        assert [clone, *denied] == [numbers[n] for n in names], machine


# --- the walls ------------------------------------------------------------------------------------------
def test_every_wall_is_proven(sandbox):
    assert set(sandbox.proof) == set(C._PROBES) and all(held for held, _ in sandbox.proof.values()), sandbox.proof
    assert not sandbox.missing and "15 of 15" in repr(sandbox)


ATTACKS = {
    "loop": ("while True: pass", "killed"),
    "catches everything": ("""
        import signal
        for s in set(signal.Signals) - {9, 19}: signal.signal(s, lambda *a: None)
        while True:
            try:
                while True: pass
            except BaseException: pass""", "killed"),
    "raises its limits": ("""
        import resource
        for name in ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE"):
            try: resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY,)*2)
            except ValueError: continue
            break
        else: raise SystemExit(1)""", "error"),
    "10 GB": ("kept = bytearray(10**10)", "error"),
    "many small ones": ("kept = []\nwhile True: kept.append(bytes(10**6))", "error"),
    "recursion": ("def f(): f()\nf()", "error"),
    "endless output": ("while True: print('x'*10000)", "error"),
    "endless errors": ("import os\nwhile True: os.write(2, b'x'*10000)", "error"),
    "a thread": ("import threading\nthreading.Thread(target=print).start()", "error"),
    "a child": ("import subprocess\nsubprocess.run(['/usr/bin/id'])", "error"),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)", "error"),
    "a socket": ("import socket\nsocket.socket()", "error"),
    "a local socket": ("import socket\nsocket.socket(socket.AF_UNIX)", "error"),
    "another user": ("import os\nos.setresuid(0, 0, 0)", "error"),
    "its own process's memory": ("open('/proc/self/mem')", "error"),
    "a device": ("open('/dev/vda')", "error"),
    "writes the library": ("import os\nopen(os.__file__, 'a')", "error"),
    "leaves": ("import sys\nsys.exit(0)", "ended"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "killed"),
}

@pytest.mark.parametrize("name", ATTACKS)
def test_attack(sandbox, name):
    program, verdict = ATTACKS[name]
    start = time.perf_counter()
    outcome = sandbox.run(textwrap.dedent(program))
    assert outcome.verdict == verdict, outcome
    assert len(outcome.printed) <= 10_000 and time.perf_counter() - start < 60


def test_kills_everything_it_can_see(sandbox):
    "kill(-1) ends what is inside, which is the program itself at most."
    sandbox.run("import os\nos.kill(-1, 9)")
    assert os.getpid()


def test_sleeper_is_ended_by_the_clock(sandbox):
    outcome = Sandbox(Limits(cpu_seconds=1, seconds=2)).run("import time\ntime.sleep(1000)")
    assert outcome.verdict == "time" and outcome.seconds < 30


def test_sees_nothing_of_this_machine(sandbox, tmp_path):
    (tmp_path/"secret").write_text("secret")
    outcome = sandbox.run(f"import os, sys\nprint(sorted(os.listdir('/')), os.path.exists({str(Path.home())!r}), os.path.exists({str(tmp_path)!r}), sorted(os.environ), os.listdir('.'), sys.prefix, os.getuid())")
    folders, rest = re.match(r"(\[.*?\]) (.*)", outcome.printed.strip()).groups()
    assert set(json.loads(folders.replace("'", '"'))) <= {"lib", "lib64", "python", "tmp", "usr"}
    *seen, uid = rest.rsplit(" ", 1)
    assert seen[0].startswith("False False [") and seen[0].endswith("[] /python") and "HOME" not in seen[0] and int(uid) != 0


def test_nothing_is_kept_between_programs(sandbox):
    assert sandbox.run("open('kept', 'w').write('x')").verdict == "ended"
    assert sandbox.run("import os\nprint(os.listdir('.'))").printed == "[]\n"


def test_no_file_or_process_of_a_sandbox_is_left(sandbox):
    before, files = uids(), set(os.listdir("/proc/self/fd"))
    for program in ("print(1)", "while True: pass", "import os\nos._exit(3)"): sandbox.run(program)
    sandbox.check(GCD, TEST, "g")
    assert uids() <= before and set(os.listdir("/proc/self/fd")) == files


def test_several_at_once_have_users_of_their_own(sandbox):
    "16 sandboxes of one process each: a shared user would exceed the limit."
    said = []
    threads = [threading.Thread(target=lambda: said.append(sandbox.run("import os\nprint(os.getuid())").printed)) for _ in range(16)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(said) == 16 and all(s.strip().isdigit() for s in said)


# --- a fork bomb, under a second limit of our own ---------------------------------------------------------
def outer_limit(n):
    "A new control group that holds at most n processes, or None where this machine lets us make none."
    for base in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")):
        group = base/f"ftcourse_test_{os.getpid()}"
        try:
            group.mkdir()
            (group/"pids.max").write_text(str(n))
            return group
        except OSError:
            if group.exists(): group.rmdir()
    return None


def emptied(group, seconds=20):
    "Whether all of the group's processes are gone in time; what was killed stays in it until its new parent has noticed."
    end = time.monotonic() + seconds
    while (left := (group/"pids.current").read_text().strip()) != "0" and time.monotonic() < end: time.sleep(0.05)
    return left == "0"


BOMB = """
import threading, time
from pathlib import Path
from ftcourse.evals.code import Limits, Sandbox
most, going = [0], [True]
def current(): return int(Path({group!r}, "pids.current").read_text())
def watch():
    while going: most[0] = max(most[0], current()); time.sleep(0.01)
def settled():
    "The count once the probes' processes are gone: the same for a second."
    seen, since = current(), time.monotonic()
    while time.monotonic() < since + 1:
        time.sleep(0.05)
        if current() != seen: seen, since = current(), time.monotonic()
    return seen
bomb = "import os\\nwhile True:\\n    try: os.fork()\\n    except OSError: pass"
for n in (1, 6):
    sandbox, most[0] = Sandbox(Limits(cpu_seconds=1, seconds=4, n_processes=n)), 0
    before = settled()
    going[:] = [True]
    watcher = threading.Thread(target=watch); watcher.start()
    outcome = sandbox.run(bomb)
    going.clear(); watcher.join()
    print(n, outcome.verdict, most[0] - before, sandbox.run("print('goes on')").printed.strip())
"""

def test_fork_bomb(sandbox):
    "In a control group of 150 processes, ended after two minutes whatever happens. The inner limit holds long before: beside the bomb there are bwrap's two and the watcher."
    if (group := outer_limit(150)) is None: pytest.skip("no control group can be made here, so no bomb is set off")
    command = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c \"$0\""
    try:
        done = subprocess.run(["timeout", "-s", "KILL", "120", "sh", "-c", command, BOMB.format(group=str(group))], capture_output=True, text=True, cwd=PACKAGE)
        lines = [line.split(" ", 3) for line in done.stdout.splitlines()]
        assert [line[0] for line in lines] == ["1", "6"], done.stderr[-2000:]
        for n, verdict, most, then in lines: assert verdict in ("killed", "time") and int(n) <= int(most) <= int(n) + 4 and then == "goes on", lines
        assert emptied(group)
    finally:
        for pid in (group/"cgroup.procs").read_text().split(): os.kill(int(pid), 9)
        if emptied(group): group.rmdir()


# --- without root, and without namespaces -----------------------------------------------------------------
def by_system_python(program, **kwargs):
    done = subprocess.run([SYSTEM_PYTHON, "-c", "import sys; sys.path.insert(0, '.')\nfrom ftcourse.evals.code import *\n" + program], capture_output=True, text=True, cwd=PACKAGE, env={"PATH": os.environ["PATH"]}, **kwargs)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@as_root
def test_a_plain_user_has_the_same_walls():
    "Namespaces of a user's own: all walls but those that this machine keeps from users."
    try: out = by_system_python(f"s = Sandbox()\nprint(s.missing, s.check({GCD!r}, {TEST!r}, 'g').verdict, s.run('import os; os.fork()').verdict)", user=65001, group=65001, extra_groups=[])
    except AssertionError as e:
        if "namespace" in str(e) or "Permission" in str(e): pytest.skip("users may not make namespaces here, or not read this folder")
        raise
    assert out == "() passed error\n"


@as_root
def test_without_namespaces_it_refuses_and_says_what_is_missing():
    out = by_system_python("""
try: Sandbox(bwrap=None)
except SandboxError as e: print(sorted(e.missing)); print(e)
s = Sandbox(Limits(cpu_seconds=1, seconds=120), bwrap=None, accept=("folder", "reading", "writing"))
print(sorted(s.missing), s.run("while True: pass").verdict, s.run("import os; os.fork()").verdict)""")
    assert out.startswith("['folder', 'reading', 'writing']\n") and out.endswith("['folder', 'reading', 'writing'] killed error\n")
    assert "nothing is run" in out and "there is no bwrap" in out and "apt-get install bubblewrap" in out and "accept=['folder'" in out


def test_a_bwrap_that_fails_is_not_trusted(tmp_path):
    "A bwrap that runs the command without any wall, and one that can't start."
    (tmp_path/"open").write_text("#!/bin/sh\nwhile [ \"${1#/python/}\" = \"$1\" ]; do shift; done; shift\nexec " + str(C._python()[0]) + " \"$@\"\n")
    (tmp_path/"fails").write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2; exit 1\n")
    for f in tmp_path.iterdir(): f.chmod(0o755)
    with pytest.raises(SandboxError, match="No permissions to create new namespace"): Sandbox(bwrap=str(tmp_path/"fails"))
    assert {"reading", "writing", "folder"} <= {name for name, (held, _) in C._proven(Limits(cpu_seconds=1), str(tmp_path/"open")).items() if not held}


def test_children_are_counted_and_end_with_their_parent():
    "With more than one process allowed: the probes for time and for what is left behind have children then."
    sandbox = Sandbox(Limits(cpu_seconds=1, n_processes=4))
    assert not sandbox.missing
    outcome = sandbox.run("import subprocess\nprint(subprocess.run(['/usr/bin/id', '-u'], capture_output=True, text=True).stdout)")
    assert outcome.verdict == "ended" and int(outcome.printed) >= 61184 or os.getuid(), outcome
    assert sandbox.run("import os, time\nfor _ in range(4): os.fork() or time.sleep(5)").verdict == "error"


def test_bad_settings():
    for name, value in dict(seconds=0, cpu_seconds=0, memory=1000, n_processes=0, file_bytes=1, folder_bytes=0).items():
        with pytest.raises(ValueError, match=f"{name}={value}"): Limits(**{name: value})
    with pytest.raises(ValueError, match="nets"): Sandbox(accept=["nets"])


# --- verdicts ---------------------------------------------------------------------------------------------
CHEATS = {
    "wrong": ("def g(a, b): return 1", "wrong"),
    "equal to everything": ("class Y:\n    def __eq__(s, o): return True\ndef g(a, b): return Y()", "wrong"),
    "a number equal to everything": ("class Y(int):\n    def __eq__(s, o): return True\ndef g(a, b): return Y(3)", "wrong"),
    "leaves": ("import sys\ndef g(a, b): sys.exit(0)", "error"),
    "leaves at once": ("import sys\nsys.exit(0)", "error"),
    "flees": ("import os\ndef g(a, b): os._exit(0)", "ended"),
    "flees at once": ("import os\nos._exit(0)", "ended"),
    "raises": ("def g(a, b): raise KeyError('x')", "error"),
    "pretends to be the test": ("def g(a, b): raise AssertionError", "error"),
    "no function": ("x = 1", "error"),
    "a number": ("g = 1", "error"),
    "no Python": ("def g(a, b:", "error"),
    "patches": ("import builtins\nbuiltins.AssertionError = builtins.isinstance = print\ndef check(c): pass\ndef g(a, b): return 0", "error"),
    "looks through the stack": ("import sys\ndef g(a, b):\n    f = sys._getframe()\n    while f: f.f_globals['check'] = f.f_locals['candidate'] = lambda *a: None; f = f.f_back\n    return 0", "wrong"),
    "prints the verdict": ("def g(a, b):\n    print('\\n[\"passed\", \"\"]', flush=True)\n    return 0", "wrong"),
    "loops": ("def g(a, b):\n    while True: pass", "killed"),
    "loops when loaded": ("while True: pass\ndef g(a, b): return 1", "killed"),
    "returns too much": ("def g(a, b): return 'x'*(2*2**20)", None),
    "returns without end": ("def g(a, b):\n    x = []\n    x.append(x)\n    return x", "error"),
    "answers before it is asked": ("import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"value\": 0}\\n'*50)\n    except OSError: pass\ndef g(a, b): return 0", "error"),
    "answers with nonsense": ("import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'hello\\n[1]\\n{}\\n')\n    except OSError: pass\ndef g(a, b): return 1", None),
    "answers with a deep nest": ("import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'['*60000 + b'\\n')\n    except OSError: pass\ndef g(a, b): return 1", None),
    "answers by a strange name": ("import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"value\": true}\\n{\"value\": {\"eval\": [\"1\"]}}\\n')\n    except OSError: pass\ndef g(a, b): return 1", None),
    "changes its arguments": ("def g(a, b):\n    a = b = 1\n    return a", "wrong"),
}

@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(sandbox, name):
    program, verdict = CHEATS[name]
    outcome = sandbox.check(program, TEST, "g")
    assert not outcome.passed and (verdict is None or outcome.verdict == verdict), outcome


def test_a_test_that_catches_everything_is_no_way_out(sandbox):
    test = "def check(c):\n    try: c(1, 2)\n    except Exception: pass\n"
    assert sandbox.check("import os\ndef g(a, b): os._exit(0)", test, "g").verdict == "ended"
    assert sandbox.check("def g(a, b): raise ValueError", test, "g").passed  # here the test itself allows it


def test_a_test_may_expect_an_exception(sandbox):
    test = "def check(c):\n    try: c(-1)\n    except ValueError as e: assert 'below 0' in str(e)\n    else: assert False\n"
    assert sandbox.check("def root(x):\n    if x < 0: raise ValueError('below 0')", test, "root").passed
    assert sandbox.check("def root(x):\n    if x < 0: raise KeyError('below 0')", test, "root").verdict == "error"
    assert sandbox.check("def root(x): return 1", test, "root").verdict == "wrong"


def test_the_program_does_not_see_the_test(sandbox):
    program = "import sys, gc\ndef g(a, b):\n    print([x for x in gc.get_objects() if isinstance(x, dict) and 'test' in x], sys.argv, sys.stdin.read())\n    return 1"
    outcome = sandbox.check(program, TEST, "g", setup="secret = 1")
    assert outcome.verdict == "wrong" and "assert" not in outcome.printed and "secret" not in outcome.printed


@pytest.mark.parametrize("test", ["import nothing", "def check(c:", "x = 1", "assert False"])
def test_a_broken_test_is_no_fault_of_the_program(sandbox, test):
    with pytest.raises(ValueError, match="the test of g can't run"): sandbox.check(GCD, test, "g")


# --- sets of tasks -----------------------------------------------------------------------------------------
def solved(rows, sandbox): return evaluate_code(rows, [[r["canonical_solution"]] for r in rows], sandbox)

def test_some_canonical_solutions_pass(sandbox):
    "Those whose tests use helpers of the prompt, the function's own name, or random numbers, and a few others."
    rows = [ROWS[i] for i in (0, 32, 33, 38, 50, 53, 106, 148, 162)]
    assert solved(rows, sandbox).verdicts() == {"passed": len(rows)}


@pytest.mark.slow
def test_all_canonical_solutions_pass():
    assert solved(ROWS, Sandbox()).verdicts() == {"passed": 164}


def test_order_and_file(sandbox, tmp_path):
    rows = ROWS[:3]
    good, bad = [r["canonical_solution"] for r in rows], "    return None\n"
    run = evaluate_code(rows, [[bad, good[0]], [good[1]], [bad, bad]], sandbox, workers=4)
    assert [[o.passed for o in outcomes] for outcomes in run.outcomes] == [[False, True], [True], [False, False]]
    lines = [json.loads(line) for line in run.save(tmp_path/"samples.jsonl").read_text().splitlines()]
    assert [(x["task_id"], x["passed"]) for x in lines] == [("HumanEval/0", False), ("HumanEval/0", True), ("HumanEval/1", True), ("HumanEval/2", False), ("HumanEval/2", False)]
    kept, answers = read_samples(tmp_path/"samples.jsonl", ROWS)
    assert kept == rows and answers == run.answers


@pytest.mark.parametrize("line", ["{", "[]", '{"task_id": "HumanEval/0"}', '{"task_id": "Other/1", "completion": ""}', "3"])
def test_bad_samples_are_named_by_line(tmp_path, line):
    (tmp_path/"s.jsonl").write_text('{"task_id": "HumanEval/0", "completion": ""}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="line 3"): read_samples(tmp_path/"s.jsonl", ROWS)


@pytest.mark.parametrize("rows, answers, words", [([], [], "0 rows"), (ROWS[:2], [[""]], "2 rows and 1"), ([{**ROWS[0], "test": None}], [[""]], r"row 0 has no text in \['test'\]"),
                                                  (ROWS[:1], [[]], "row 0"), (ROWS[:1], [[None]], "row 0"), ([{"prompt": "x"}], [["y"]], "task_id")])
def test_bad_sets(rows, answers, words):
    with pytest.raises(ValueError, match=words): evaluate_code(rows, answers, None)


def test_program_of():
    row = dict(prompt="import math\n\ndef f(x):\n    '''Say x.'''\n", entry_point="f")
    def value(answer):
        space = {}
        exec(program_of(row, answer), space)
        return space["f"](2)
    assert value("    return x\n") == 2
    assert value("Here:\n```python\ndef f(x):\n    return math.floor(x) + 1\n```\nand so on (not Python)") == 3
    assert value("```py\nx = 1\n```\n```\ndef f(x): return 5\n```") == 5
    assert value("```python\ndef f(x): return 6") == 6  # cut before its end
    with pytest.raises(SyntaxError): value("I can't do that.")
    with pytest.raises(SyntaxError): value("```python\ndef ff(x): return 6\n```")


def test_write_code():
    from ftcourse.models import generate, load
    model, tokenizer = load("tiny")
    rows = ROWS[:3]
    greedy = write_code(model, tokenizer, rows, 2, max_new_tokens=6, temperature=0)
    assert [len(a) for a in greedy] == [2]*3 and all(a == b for a, b in greedy)
    assert [a for a, _ in greedy] == generate(model, tokenizer, [r["prompt"] for r in rows], max_new_tokens=6, stop=C.STOPS)
    drawn = write_code(model, tokenizer, rows, 2, max_new_tokens=6, temperature=1.0)
    assert any(a != b for a, b in drawn) and drawn == write_code(model, tokenizer, rows, 2, max_new_tokens=6, temperature=1.0, batch_size=1)
    chats = write_code(model, tokenizer, rows[:1], max_new_tokens=6, temperature=0, chat=True)
    assert chats[0][0] == generate(model, tokenizer, [[{"role": "user", "content": f"Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{rows[0]['prompt']}```"}]], max_new_tokens=6)[0]
    with pytest.raises(ValueError, match="n_samples=0"): write_code(model, tokenizer, rows, 0)
