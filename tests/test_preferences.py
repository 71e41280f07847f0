"""Preferences: blind tasks, a file that survives crashes, three front ends, agreement against published numbers and other libraries, what to label next."""
import http.client, itertools, json, math, os, random, socket, sys, threading, time, types, urllib.error, urllib.request

import numpy as np
import pytest

from ftcourse.align import preferences as P
from ftcourse.align.preferences import (Judgement, Judgements, JudgeServer, NotebookJudge, Session, balanced_orders, bradley_terry, class_posterior, cohen_kappa, dawid_skene, disagreement,
    fit_ensemble, fit_reward, fleiss_kappa, gold_scores, judge, judge_by_prompts, judge_in_browser, judged_rows, krippendorff_alpha, labels_needed, make_tasks, noisy_choices, pair_accuracy,
    parse_ranking, ranking_pairs, row_key, selection_curve, synthetic_votes, vote_table)

ROWS = [{"prompt": f"number {i}", "completions": [f"{w} {i}" for w in ("old", "new", "odd", "own")[:2 + 2*(i > 3)]], "authors": ["base", "secretbot", "c", "d"]} for i in range(6)]
WHEN = "2025-01-01T10:00:00+00:00"

def _judgement(task="t", annotator="Ann", ranks=(1, 2)): return Judgement(task, annotator, ranks, tuple(range(len(ranks))), 1., WHEN)

def _best_first(task): return "".join("ABCD"[task.replies.index(r)] for r in sorted(task.replies)) # new < odd < old < own


# --- blind tasks -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, K", [(1, 2), (7, 2), (40, 2), (12, 3), (13, 4), (90, 9)])
def test_each_reply_stands_on_each_place_equally_often(n, K):
    for seed in range(5):
        orders = balanced_orders(n, K, random.Random(seed))
        assert len(orders) == n and all(sorted(o) == list(range(K)) for o in orders)
        counts = [sum(o[place] == reply for o in orders) for place in range(K) for reply in range(K)]
        assert max(counts) - min(counts) <= 1


def test_orders_have_no_pattern():
    # in an unshuffled list each second order would mirror the one before; here about half of them do
    orders = balanced_orders(2000, 2, random.Random(0))
    assert .42 < np.mean([a != b for a, b in zip(orders[::2], orders[1::2])]) < .58
    assert len({o for seed in range(40) for o in balanced_orders(4, 4, random.Random(seed))}) == 24


def test_tasks_are_blind_and_fit_their_rows():
    tasks = make_tasks(ROWS, "Ann")
    assert "secretbot" not in repr(tasks) and len(tasks) == 6
    rows = {row_key(r): r for r in ROWS}
    assert {t.key for t in tasks} == set(rows)
    assert all(t.replies == tuple(rows[t.key]["completions"][i] for i in t.order) and t.prompt == rows[t.key]["prompt"] for t in tasks)
    assert tasks == make_tasks(ROWS, "Ann") and tasks != make_tasks(ROWS, "Bo") and tasks != make_tasks(ROWS, "Ann", seed=1)
    pairs = [{"prompt": str(i), "completions": ["x", "y"]} for i in range(30)]
    for who in "abc": assert sum(t.order == (0, 1) for t in make_tasks(pairs, who)) == 15


def test_key_is_of_the_texts_alone():
    row = ROWS[0]
    assert row_key(row) == row_key({**row, "authors": None, "gold": [1, 2]}) != row_key({**row, "prompt": "other"})
    assert row_key(row) != row_key({**row, "completions": row["completions"][::-1]})
    assert row_key({"prompt": "p", "completions": ["a", "b"]}) == row_key({"prompt": "p", "chosen": "a", "rejected": "b"})
    assert row_key({"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}) == row_key({"prompt": "p", "completions": ["a", "b"]})
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert make_tasks([{"prompt": chat, "completions": ["a", "b"]}])[0].prompt == "system: Be brief.\n\nuser: Hi"


@pytest.mark.parametrize("row, said", [({"prompt": "p", "completions": ["a"]}, "1 replies"), ({"prompt": "p", "completions": list(map(str, range(27)))}, "27 replies"), ({"completions": ["a", "b"]}, "needs `prompt`"),
                                       ({"prompt": "p"}, "needs `prompt`"), ({"prompt": "p", "completions": ["a", "a"]}, "same text"), ({"prompt": "p", "completions": ["a", 3]}, "row 1"),
                                       ({"prompt": [], "completions": ["a", "b"]}, "row 1"), ({"prompt": "number 0", "completions": ["old 0", "new 0"]}, "row 1 repeats row 0")])
def test_rows_that_cannot_be_judged(row, said):
    with pytest.raises(ValueError, match=said): make_tasks([ROWS[0], row])


# --- rankings ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, n, ranks", [("D > C > A = B", 4, (3, 3, 2, 1)), ("dcab", 4, (3, 4, 2, 1)), ("A=B=C", 3, (1, 1, 1)), ("b = c a", 3, (2, 1, 1)), ("C>A=B>D", 4, (2, 2, 1, 3)),
                                            ("A", 2, (1, 2)), ("b", 2, (2, 1)), ("=", 2, (1, 1)), ("B>A", 2, (2, 1)), ("a = b", 2, (1, 1))])
def test_written_rankings(text, n, ranks): assert parse_ranking(text, n) == ranks


@pytest.mark.parametrize("text, n", [("", 2), ("C", 2), ("A B A", 2), ("A > B", 3), ("A > B > C > D", 3), ("A >> B", 2), ("> A B", 2), ("A = ", 2), ("1 2", 2), ("=", 3), ("A", 3), ("A > B <b>", 2)])
def test_rankings_that_are_refused(text, n):
    with pytest.raises(ValueError, match="once, best first"): parse_ranking(text, n)


def test_pairs_of_a_ranking():
    assert ranking_pairs((3, 3, 2, 1)) == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert ranking_pairs((1, 2)) == [(0, 1)] and ranking_pairs((2, 1)) == [(1, 0)] and ranking_pairs((1, 1, 1)) == []
    assert all(len(ranking_pairs(p)) == 10 for p in itertools.permutations(range(5)))


# --- the file ----------------------------------------------------------------------------------------------------
def test_on_the_disk_before_add_returns(tmp_path, monkeypatch):
    store, seen, sync = Judgements(tmp_path / "new" / "j.jsonl"), [], os.fsync
    def fsync(fd):
        if store.path.exists(): seen.append(store.path.read_bytes())
        sync(fd)
    monkeypatch.setattr(os, "fsync", fsync)
    for i in range(3): store.add(_judgement(f"t{i}"))
    assert seen[-1].count(b"\n") == 3 and [s.count(b"\n") for s in dict.fromkeys(seen)] == [1, 2, 3]
    assert json.loads(seen[-1].splitlines()[2]) == dict(task="t2", annotator="Ann", ranks=[1, 2], shown=[0, 1], seconds=1., time=WHEN)


def test_a_killed_process_loses_nothing(tmp_path):
    child = os.fork()
    if child == 0:
        store = Judgements(tmp_path / "j.jsonl")
        for i in range(5): store.add(_judgement(f"t{i}"))
        os._exit(9)
    os.waitpid(child, 0)
    assert [j.task for j in Judgements(tmp_path / "j.jsonl")] == [f"t{i}" for i in range(5)]


def test_torn_at_every_byte(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None) # a thousand waits for the disk
    store = Judgements(tmp_path / "j.jsonl")
    for i in range(3): store.add(_judgement(f"t{i}", "Zoë"))
    whole, path, torn = store.path.read_bytes(), store.path, tmp_path / "j.jsonl.torn"
    ends = [i + 1 for i, b in enumerate(whole) if b == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        torn.unlink(missing_ok=True)
        n = sum(e - 1 <= cut for e in ends) # a line that lacks only its line end is whole
        again = Judgements(path)
        assert len(again) == n and path.read_bytes() == whole[:ends[n-1]] if n else path.read_bytes() == b""
        lost = whole[ends[n-1] if n else 0:cut]
        assert (torn.read_bytes() == lost + b"\n") if lost else not torn.exists()
        assert ("was torn" in capsys.readouterr().out) == bool(lost)
    again.add(_judgement("t9"))
    assert len(Judgements(path)) == 4


def test_zeros_after_a_power_failure_are_set_aside(tmp_path):
    path = tmp_path / "j.jsonl"
    Judgements(path).add(_judgement())
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(40))
    assert len(Judgements(path)) == 1 and path.read_bytes() == whole and (tmp_path / "j.jsonl.torn").read_bytes() == bytes(40) + b"\n"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    store = Judgements(tmp_path / "j.jsonl")
    store.add(_judgement("t0"))
    before = store.path.read_bytes()
    def full(fd): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"): store.add(_judgement("t1"))
    assert store.path.read_bytes() == before and len(store) == 1
    store.add(_judgement("t1"))
    assert len(Judgements(store.path)) == 2


def test_the_last_one_counts_and_nothing_is_rewritten(tmp_path):
    store = Judgements(tmp_path / "j.jsonl")
    for ranks in ((1, 2), (2, 1)): store.add(_judgement(ranks=ranks))
    store.add(_judgement(annotator="Bo"))
    for s in (store, Judgements(store.path)): assert len(s) == 2 and s.of("Ann")["t"].ranks == (2, 1) and set(s.of("Bo")) == {"t"} and s.of("Eve") == {}
    assert store.path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("line", ['{"task": "t"}', '{"task": "t", "annotator": "A", "ranks": [1, 3], "shown": [0, 1], "seconds": 1, "time": "x"}', "not json", '[1, 2]',
                                  '{"task": "t", "annotator": "A", "ranks": [1, 2], "shown": [0, 0], "seconds": 1, "time": "x"}', '{"task": "t", "annotator": "", "ranks": [1, 2], "shown": [0, 1], "seconds": 1, "time": "x"}',
                                  '{"task": "t", "annotator": "A", "ranks": "12", "shown": [0, 1], "seconds": 1, "time": "x"}', '{"task": "t", "annotator": "A", "ranks": [1, 2], "shown": [0, 1], "seconds": -1, "time": "x"}',
                                  '{"task": "t", "annotator": "A", "ranks": [1, 2], "shown": [0, 1], "seconds": 1, "time": "x", "more": 1}'])
def test_a_foreign_line_is_said_and_kept(tmp_path, line):
    path = tmp_path / "j.jsonl"
    Judgements(path).add(_judgement())
    with open(path, "a") as f: f.write(line + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"(row|line) 2"): Judgements(path)
    assert path.read_bytes() == before


def test_only_jsonl(tmp_path):
    with pytest.raises(ValueError, match="jsonl"): Judgements(tmp_path / "j.json")


def test_threads_write_whole_lines(tmp_path):
    store = Judgements(tmp_path / "j.jsonl")
    threads = [threading.Thread(target=lambda w=w: [store.add(_judgement(f"t{i}", f"W{w}")) for i in range(20)]) for w in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(store) == len(Judgements(store.path)) == 120


# --- the session -------------------------------------------------------------------------------------------------
def test_ranks_are_those_of_the_row(tmp_path):
    store = Judgements(tmp_path / "j.jsonl")
    session = Session(ROWS, store, " Ann ")
    while task := session.next(): session.save(task.key, _best_first(task), 2)
    for row in ROWS:
        j = store.of("Ann")[row_key(row)]
        assert j.ranks == ((2, 1) if len(row["completions"]) == 2 else (3, 1, 2, 4)) # alphabetically: new, odd, old, own
    assert session.done() == 6 and {j.shown for j in store} > {(0, 1), (1, 0)}


def test_goes_on_where_it_stopped_whatever_the_order_of_the_rows(tmp_path):
    path = tmp_path / "j.jsonl"
    session = Session(ROWS, Judgements(path), "Ann")
    for _ in range(4): session.save(session.next().key, _best_first(session.next()))
    rest = session.next().key, [k for k in session.tasks if k not in session.judgements.of("Ann")]
    again = Session(ROWS, Judgements(path), "Ann")
    assert again.done() == 4 and (again.next().key, [k for k in again.tasks if k not in again.judgements.of("Ann")]) == rest
    assert Session(ROWS[::-1], Judgements(path), "Ann").done() == 4 and Session(ROWS, Judgements(path), "Bo").done() == 0


def test_what_a_session_refuses(tmp_path):
    store = Judgements(tmp_path / "j.jsonl")
    for name in ("", "  ", "x"*61, "a\nb", None, 3, "\x1b[2J"):
        with pytest.raises(ValueError, match="name of 1 to 60"): Session(ROWS, store, name)
    session = Session(ROWS, store, "Ann")
    with pytest.raises(ValueError, match="no task"): session.save("nope", "A")
    for seconds in (math.inf, math.nan, -1):
        with pytest.raises(ValueError, match="Judgement"): session.save(session.next().key, _best_first(session.next()), seconds)
    assert len(store) == 0 and not store.path.exists()


# --- plain prompts and widgets -----------------------------------------------------------------------------------
def _prompted(session, *said):
    "(saved, what was shown) with these answers; an exception among them is raised."
    said, shown = iter(said), []
    def ask(question):
        answer = next(said)
        if isinstance(answer, type): raise answer
        return answer
    return judge_by_prompts(session, ask, shown.append), shown


@pytest.mark.parametrize("leave", ["stop", EOFError, KeyboardInterrupt])
def test_prompts_slip_back_and_leave(tmp_path, leave):
    session = Session(ROWS[:4], Judgements(tmp_path / "j.jsonl"), "Ann")
    first = session.next()
    saved, shown = _prompted(session, "back", "who?", "A", "back", "=", "B", leave)
    assert saved == 3 and session.done() == 2 and session.judgements.of("Ann")[first.key].ranks == (1, 1)
    assert any("once, best first" in s for s in shown) and "2 of 4" in shown[-1]
    assert _prompted(session, "A", "A")[0] == 2 and session.next() is None


def test_control_characters_are_shown_not_sent(tmp_path):
    session = Session([{"prompt": "clear\x1b[2J", "completions": ["a\x07", "\u202eb\nc"]}], Judgements(tmp_path / "j.jsonl"), "Ann")
    shown = "".join(_prompted(session, "stop")[1])
    assert "\\x1b[2J" in shown and "\\x07" in shown and "\\u202e" in shown and not set(shown) & set("\x1b\x07\u202e") and "b\nc" in shown


def _click(box, label):
    next(b for b in box.children[1].children if b.description == label).click()


def test_buttons(tmp_path):
    session = Session([{"prompt": "<b>p</b>", "completions": ["<script>", "fine & good"]}, ROWS[4]], Judgements(tmp_path / "j.jsonl"), "Ann")
    judge, done = NotebookJudge(session), []
    for _ in range(2):
        if len(judge.task.replies) == 2:
            assert "<script" not in judge.box.children[0].value and "&lt;script&gt;" in judge.view.value and "&lt;b&gt;p" in judge.view.value
            done.append((judge.task, (2, 1) if judge.task.order == (0, 1) else (1, 2)))
            _click(judge.box, "B is better")
        else:
            judge.field.value = "A > <i>"
            _click(judge.box, "save")
            assert "Not saved" in judge.note.value and "<i>" not in judge.note.value
            done.append((judge.task, (3, 1, 2, 4)))
            judge.field.value = _best_first(judge.task)
            _click(judge.box, "save")
            assert judge.note.value == ""
    assert judge.task is None and "Thank you" in judge.view.value and [b.description for b in judge.row.children] == ["back"]
    for task, ranks in done: assert session.judgements.of("Ann")[task.key].ranks == ranks
    _click(judge.box, "back")
    assert judge.task == done[-1][0]


@pytest.mark.parametrize("has_shell, has_widgets", itertools.product((False, True), repeat=2))
def test_which_front_end(tmp_path, monkeypatch, has_shell, has_widgets):
    session = Session(ROWS[:1], Judgements(tmp_path / "j.jsonl"), "Ann")
    shell = types.SimpleNamespace(kernel=object()) if has_shell else None
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(P.importlib.util, "find_spec", lambda name: object() if has_widgets else None)
    monkeypatch.setattr(P, "judge_by_prompts", lambda session: "prompts")
    assert (judge(session) == "prompts") == (not (has_shell and has_widgets))
    monkeypatch.delitem(sys.modules, "IPython")
    assert judge(session) == "prompts"


# --- the page ----------------------------------------------------------------------------------------------------
@pytest.fixture
def server(tmp_path):
    with JudgeServer(ROWS, Judgements(tmp_path / "j.jsonl")) as s: yield s


def _request(url, body=None, **headers):
    "(status, answer) of a request; a dict or bytes as body makes it a POST."
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}})
    try:
        with urllib.request.urlopen(asked, timeout=10) as reply: return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as e: return e.code, json.loads(e.read())


def test_two_people_judge_at_the_page(server):
    orders = {}
    for who in ("Ann", "Bo Ö"):
        name, seen = urllib.parse.quote(who), []
        _, task = _request(f"{server.url}next?annotator={name}")
        while task["key"]:
            assert set(task) == {"key", "prompt", "replies", "done", "total"} and task["done"] == len(seen) and "secretbot" not in json.dumps(task)
            seen.append(task["key"])
            _, task = _request(server.url + "save", dict(annotator=who, task=task["key"], ranking=_best_first(types.SimpleNamespace(**task)), seconds=1.5))
        assert len(seen) == 6 and task["done"] == 6
        orders[who] = seen
    assert orders["Ann"] != orders["Bo Ö"]
    again = Judgements(server.judgements.path)
    assert len(again) == 12 and all(again.of("Bo Ö")[row_key(r)].ranks == ((2, 1) if len(r["completions"]) == 2 else (3, 1, 2, 4)) for r in ROWS)


def test_the_page_is_alone(server):
    with urllib.request.urlopen(server.url, timeout=10) as reply: page, headers = reply.read().decode(), reply.headers
    assert "://" not in page and "src=" not in page and "NONCE" not in page and "innerHTML" not in page and headers["Content-Type"] == "text/html; charset=utf-8"
    nonce = page.split('nonce="')[1].split('"')[0]
    assert f"script-src 'nonce-{nonce}'" in headers["Content-Security-Policy"] and headers["Content-Security-Policy"].startswith("default-src 'none'") and "unsafe" not in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    with urllib.request.urlopen(server.url, timeout=10) as reply: assert nonce not in reply.read().decode()


def test_only_this_machine(server):
    assert server.server_address[0] == "127.0.0.1" and len(server.secret) >= 20
    with pytest.raises(ValueError, match="can't be opened"): JudgeServer(ROWS, server.judgements, port=server.server_port)
    assert JudgeServer(ROWS, server.judgements).server_close() is None


def _good(server, **change):
    key = next(iter(server.session("Ann").tasks))
    return {"annotator": "Ann", "task": key, "ranking": _best_first(server.session("Ann").tasks[key]), "seconds": 1, **change}


@pytest.mark.parametrize("headers", [{"Origin": "https://elsewhere.example"}, {"Origin": "null"}, {"Host": "elsewhere.example"}, {"Host": "127.0.0.1:1"}, {"Host": "127.0.0.1"}, {"Origin": "http://127.0.0.1:1"}])
def test_other_origins_and_hosts_are_refused(server, headers):
    for url, body in ((server.url + "save", _good(server)), (server.url + "next?annotator=Ann", None), (server.url, None)): assert _request(url, body, **headers)[0] == 403
    assert len(server.judgements) == 0


def test_our_own_origin_and_localhost_are_fine(server):
    own = f"http://127.0.0.1:{server.server_port}"
    assert _request(server.url + "save", _good(server), Origin=own)[0] == 200
    local = f"localhost:{server.server_port}"
    assert _request(server.url + "save", _good(server), Host=local, Origin=f"http://{local}")[0] == 200
    assert _request(server.url + "save", _good(server), Host=local, Origin=own)[0] == 403


def test_the_secret_is_needed(server):
    own = f"http://127.0.0.1:{server.server_port}"
    for path in ("/", "/next?annotator=Ann", "/wrong/next?annotator=Ann", f"/{server.secret}", f"/{server.secret[:-1]}/", f"/{server.secret}/elsewhere", f"/{server.secret}/../", "/%C3%A9/"):
        assert _request(own + path)[0] == 404, path
    assert _request(f"{own}/wrong/save", _good(server))[0] == 404 and len(server.judgements) == 0


@pytest.mark.parametrize("change", [dict(task="nope"), dict(task=[1]), dict(ranking="A > A"), dict(ranking=None), dict(annotator=""), dict(annotator=["Ann"]), dict(annotator={}), dict(seconds="1"), dict(seconds=True),
                                    dict(seconds=-1), dict(seconds=None), dict(annotator="\ud800"), dict(annotator="x"*61), dict(ranking="\ud800")])
def test_bad_fields_write_nothing(server, change):
    status, said = _request(server.url + "save", _good(server, **change))
    assert status == 400 and said["error"] and len(server.judgements) == 0
    assert _request(server.url + "save", _good(server))[0] == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"["*60_000, b'{"seconds": 1e999}', b'{"seconds": NaN}'])
def test_bad_bodies_write_nothing(server, body): assert _request(server.url + "save", body)[0] == 400 and len(server.judgements) == 0


def test_bad_requests_write_nothing(server):
    assert _request(server.url + "save", _good(server), Content_Type="text/plain")[0] == 404
    assert _request(server.url + "next", {})[0] == 404 and _request(server.url + "next")[0] == 400
    for length in ("70000", "-1", "x", None):
        client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        client.putrequest("POST", f"/{server.secret}/save")
        if length: client.putheader("Content-Length", length)
        client.endheaders()
        assert client.getresponse().status == 413
        client.close()
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD"):
        client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        client.request(method, f"/{server.secret}/")
        assert client.getresponse().status == 501
        client.close()
    assert len(server.judgements) == 0


def test_a_full_disk_is_said_at_the_page(server, monkeypatch):
    def full(fd): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        status, said = _request(server.url + "save", _good(server))
    assert status == 500 and "No space" in said["error"] and len(server.judgements) == 0 and not server.judgements.path.read_bytes()


def test_a_browser_that_goes_away_does_no_harm(server):
    with socket.create_connection(("127.0.0.1", server.server_port)) as s: s.sendall(f"POST /{server.secret}/save HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Length: 500\r\n\r\n{{".encode())
    assert _request(server.url + "save", _good(server))[0] == 200 and len(server.judgements) == 1


def test_serving_until_ctrl_c(tmp_path, monkeypatch, capsys):
    def stop(self): raise KeyboardInterrupt
    monkeypatch.setattr(JudgeServer, "serve_forever", stop)
    judge_in_browser(ROWS, tmp_path / "j.jsonl")
    said = capsys.readouterr().out
    assert "Open http://127.0.0.1:" in said and "0 judgements" in said
    with pytest.raises(ValueError, match="same text"): judge_in_browser([{"prompt": "p", "completions": ["a", "a"]}], tmp_path / "j.jsonl")


def _until(page, selector, fits, seconds=60):
    "Wait until an element's text fits. (Playwright's own way evaluates code in the page, which the page's policy forbids.)"
    end = time.monotonic() + seconds
    while not fits(said := page.inner_text(selector)):
        assert time.monotonic() < end, f"{selector} still says {said!r}"
        page.wait_for_timeout(50)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser(tmp_path, browser, width):
    nasty = "<img src=x onerror='document.title=\"owned\"'><script>document.title='owned'</script>" + "W"*300
    rows = [{"prompt": nasty, "completions": [nasty + "1", "plain\nlines"]}, {"prompt": "p2", "completions": ["x", "y"]}, {"prompt": "three", "completions": ["a", "b", "c"]}]
    store = Judgements(tmp_path / "j.jsonl")
    with JudgeServer(rows, store) as server:
        context = browser.new_context(viewport={"width": width, "height": 800})
        page, faults = context.new_page(), []
        page.on("request", lambda r: None if r.url.startswith((f"http://127.0.0.1:{server.server_port}/", "data:")) else faults.append(r.url))
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.goto(server.url)
        page.keyboard.type("Ann")           # the name has the focus
        page.keyboard.press("Enter")
        first = None
        for done in range(3):
            _until(page, "#progress", lambda said: said.startswith(f"{done} of 3"))
            task = server.session("Ann").next()
            assert page.inner_text("#prompt") == task.prompt and page.locator("#replies .text").all_inner_texts() == list(task.replies)
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth") and page.title() == "Which is better?"
            if len(task.replies) == 3:
                page.keyboard.press("c")
                page.get_by_role("button", name="A", exact=True).click()
                page.keyboard.press("=")
                page.keyboard.press("Backspace")
                page.keyboard.press("=")
                assert page.inner_text("#choice") == "C>A=" and page.get_by_role("button", name="Save").is_disabled()
                page.keyboard.press("b")
                assert page.inner_text("#choice") == "C>A=B"
                page.locator("body").focus()
                page.keyboard.press("Enter")
            elif first is None:
                first = task
                page.keyboard.press("ArrowLeft")
            else: page.get_by_role("button", name="B is better").click()
            _until(page, "#progress", lambda said: not said.startswith(f"{done} of 3"))
        assert "Thank you, Ann" in page.inner_text("#progress")
        judged = {j.task: tuple(j.ranks[i] for i in j.shown) for j in store} # as shown
        assert sorted(judged.values()) == [(1, 2), (2, 1), (2, 2, 1)] and judged[first.key] == (1, 2)
        while page.locator("#prompt").is_hidden() or page.locator("#replies .text").all_inner_texts() != list(first.replies): page.keyboard.press("Backspace")
        page.keyboard.press("=")
        _until(page, "#progress", lambda said: said.startswith("All 3"))
        assert store.of("Ann")[first.key].ranks == (1, 1) and not faults, faults
        page.keyboard.press("Backspace")
        server.shutdown(), server.server_close()
        page.keyboard.press("=")
        _until(page, "#fault", lambda said: said.startswith("Not saved"))
        context.close()


# --- back to rows ------------------------------------------------------------------------------------------------
COLOURS = {"prompt": "Name a colour.", "completions": ["Red.", "Blue, like the sky.", "Colour? No."]}

def _votes(*rankings, row=COLOURS): return [_judgement(row_key(row), who, ranks) for who, ranks in zip(("Ann", "Bo", "Eve"), rankings)]


def test_majority_and_ties(capsys):
    rows = judged_rows([COLOURS, ROWS[0]], _votes((2, 1, 3), (1, 2, 3), (1, 1, 2)))
    assert [(r["chosen"], r["rejected"], r["votes"]) for r in rows] == [("Red.", "Colour? No.", [3, 0]), ("Blue, like the sky.", "Colour? No.", [3, 0])]
    assert "1 of 2 rows have no judgement, 1 pairs no winner" in capsys.readouterr().out
    split = judged_rows([COLOURS], _votes((1, 2, 3), (3, 2, 1), (3, 1, 2)))
    assert [(r["chosen"], r["rejected"], r["votes"]) for r in split] == [("Blue, like the sky.", "Red.", [2, 1]), ("Colour? No.", "Red.", [2, 1]), ("Blue, like the sky.", "Colour? No.", [2, 1])]
    assert capsys.readouterr().out == ""


def test_weights_decide():
    votes = _votes((1, 2, 3), (2, 1, 3), (2, 1, 3))
    first = lambda weights: judged_rows([COLOURS], votes, weights=weights)[0]["chosen"]
    assert first(None) == "Blue, like the sky." and first({"Ann": 3, "Bo": 1, "Eve": 1}) == "Red." and first({"Ann": 1, "Bo": 1, "Eve": 0.5}) == "Blue, like the sky."
    with pytest.raises(ValueError, match="none for 'Eve'"): first({"Ann": 1, "Bo": 1})
    with pytest.raises(ValueError, match="'pairs' or 'ranked'"): judged_rows([COLOURS], votes, "scores")


def test_scores_of_a_ranking():
    # Ann: red beats one, loses to one: 0; Bo: beats both: 1; Eve: equal to one, beats one: 1/2
    votes = _votes((2, 1, 3), (1, 2, 3), (1, 1, 2))
    assert judged_rows([COLOURS], votes, "ranked")[0]["scores"] == pytest.approx([1/2, 1/2, -1])
    assert judged_rows([COLOURS], votes, "ranked", {"Ann": 0, "Bo": 2, "Eve": 2})[0]["scores"] == pytest.approx([3/4, 1/4, -1])


def test_the_rows_are_the_courses():
    from ftcourse.align.prefer import preference_rows
    chat = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Go."}], "rejected": [{"role": "assistant", "content": "Hello!"}]}
    rows = judged_rows([COLOURS, chat], _votes((1, 2, 3)) + _votes((2, 1), row=chat))
    assert preference_rows(rows)[1] == "pairs" and rows[-1]["chosen"] == chat["rejected"] and rows[-1]["prompt"] == chat["prompt"]
    assert preference_rows(judged_rows([COLOURS], _votes((1, 2, 3)), "ranked"))[1] == "ranking"


def test_gold_questions_test_and_stay_out():
    gold = {**COLOURS, "gold": [1, 2, 3]}
    votes = _votes((2, 1, 3), (1, 2, 3), (1, 1, 2)) + _votes((1, 2), row=ROWS[0])
    assert gold_scores([gold, ROWS[0]], votes) == {"Ann": (2, 3), "Bo": (3, 3), "Eve": (2, 3)} and gold_scores([ROWS[0]], votes) == {}
    assert gold_scores([{**COLOURS, "gold": [1, 2, 2]}], votes) == {"Ann": (1, 2), "Bo": (2, 2), "Eve": (1, 2)}
    assert [r["prompt"] for r in judged_rows([gold, ROWS[0]], votes)] == ["number 0"] and vote_table([gold, ROWS[0]], votes)[1] == [(1, 0, 1)]
    for wrong in ([1, 2], [1, 1, 1]):
        with pytest.raises(ValueError, match="row 0"): gold_scores([{**COLOURS, "gold": wrong}], votes)


def test_vote_table():
    votes = _votes((2, 1, 3), (1, 2, 3), (1, 1, 2)) + _votes((2, 1), row=ROWS[0])
    annotators, units, table = vote_table([COLOURS, ROWS[0]], votes)
    assert annotators == ["Ann", "Bo", "Eve"] and units == [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 1)]
    assert table == [[-1, 1, 1, -1], [1, 1, 1, None], [0, 1, 1, None]]


# --- agreement ---------------------------------------------------------------------------------------------------
# Krippendorff 2011, Computing Krippendorff's alpha-reliability, section D: nominal .743, ordinal .815
KRIPPENDORFF = [[None if v == "." else int(v) for v in line] for line in ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")]
# Fleiss 1971, table 1: 30 patients, 6 psychiatrists, 5 diagnoses; kappa .430
FLEISS = [list(map(int, row)) for row in """00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006""".split()]


def test_published_alpha():
    assert round(krippendorff_alpha(KRIPPENDORFF), 3) == .743 and round(krippendorff_alpha(KRIPPENDORFF, "ordinal"), 3) == .815
    relabelled = [[v if v is None else v*v for v in line] for line in KRIPPENDORFF]
    for level in ("nominal", "ordinal"):
        assert krippendorff_alpha(relabelled, level) == krippendorff_alpha(KRIPPENDORFF, level) == krippendorff_alpha(KRIPPENDORFF[::-1], level)
    # the last unit but one lines: a unit with one vote changes nothing
    assert krippendorff_alpha([[*line, 5 if i == 0 else math.nan] for i, line in enumerate(KRIPPENDORFF)]) == pytest.approx(krippendorff_alpha(KRIPPENDORFF), abs=1e-12)


def test_alpha_by_hand():
    # aab, bb.: disagreeing pairs of votes, each way: unit 1 has 4 of 6, weighed by 1/(3-1): 2; expected 2*2*3/(5-1) = 3
    assert krippendorff_alpha(["ab", "ab", ["b", None]]) == pytest.approx(1 - 2/3)
    # ordered 1 < 2 < 3 with 2, 1, 1 votes, pairs (1,1) and (2,3): distance of 2 to 3 is (1/2 + 1/2)^2 = 1; 1-2: 1.5^2; 1-3: 2.5^2
    assert krippendorff_alpha([[1, 2], [1, 3]], "ordinal") == pytest.approx(1 - 2*1/(2*(2*2.25 + 2*6.25 + 1)/3))


def test_published_fleiss():
    votes = np.array([np.repeat(range(5), counts) for counts in FLEISS]).T
    assert round(fleiss_kappa(votes), 3) == .430
    shuffled = np.array([np.random.default_rng(i).permutation(column) for i, column in enumerate(votes.T)]).T
    assert fleiss_kappa(shuffled) == pytest.approx(fleiss_kappa(votes)) # who said it doesn't matter
    assert fleiss_kappa(["ab", "ab", "bb"]) == pytest.approx(1/4)


def test_cohen_by_hand():
    # 50 applications, two readers (yes-yes 20, yes-no 5, no-yes 10, no-no 15): observed .7, expected .5, kappa .4
    first, second = zip(*([("y", "y")]*20 + [("y", "n")]*5 + [("n", "y")]*10 + [("n", "n")]*15))
    assert cohen_kappa(first, second) == pytest.approx(.4)
    assert cohen_kappa([*first, None, "y"], [*second, "n", math.nan]) == pytest.approx(.4)
    assert cohen_kappa([1, 0, 1, 0], [0, 1, 0, 1]) == -1 and cohen_kappa([1, 1, 0], [1, 1, 1]) == 0


def test_nothing_to_compare_with():
    assert math.isnan(cohen_kappa([1, 1], [1, 1])) and math.isnan(fleiss_kappa([[1, 1]]*3)) and math.isnan(krippendorff_alpha([[1, 1]]*2))
    for call, said in ((lambda: cohen_kappa([1, None], [None, 1]), "both"), (lambda: fleiss_kappa([[1, 1], [1, None]]), r"\[1, 2\]"), (lambda: fleiss_kappa([[1, 2]]), "2 or more"), (lambda: krippendorff_alpha([[1, None], [None, 1]]), "two votes"),
                       (lambda: krippendorff_alpha([[1], [2]], "ratio"), "level"), (lambda: krippendorff_alpha([[1, 2], [1]]), r"\[1, 2\] entries"), (lambda: cohen_kappa([1, "a"], [1, 1]), "one kind")):
        with pytest.raises(ValueError, match=said): call()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_same_as_the_libraries(seed):
    krippendorff, metrics, inter = pytest.importorskip("krippendorff"), pytest.importorskip("sklearn.metrics"), pytest.importorskip("statsmodels.stats.inter_rater")
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 2 + seed, 40)
    votes = np.where(draw.random((4, 40)) < .6, truth, draw.integers(0, 2 + seed, (4, 40))).astype(float)
    assert cohen_kappa(votes[0], votes[1]) == pytest.approx(metrics.cohen_kappa_score(votes[0], votes[1]))
    assert fleiss_kappa(votes) == pytest.approx(inter.fleiss_kappa(inter.aggregate_raters(votes.T.astype(int))[0]))
    votes[draw.random(votes.shape) < .3] = np.nan
    for level in ("nominal", "ordinal"): assert krippendorff_alpha(votes, level) == pytest.approx(krippendorff.alpha(reliability_data=votes, level_of_measurement=level))


# --- whom to trust -----------------------------------------------------------------------------------------------
def test_posterior_by_enumeration():
    draw = np.random.default_rng(0)
    prior, confusion = draw.dirichlet([2]*3), draw.dirichlet([1]*3, (2, 3))
    codes = np.array([[0, 2, -1], [1, -1, -1]])
    joint = {t: math.prod(prior[c]*math.prod(confusion[a, c, codes[a, u]] for a in range(2) if codes[a, u] >= 0) for u, c in enumerate(t)) for t in itertools.product(range(3), repeat=3)}
    total = sum(joint.values())
    posterior, loglik = class_posterior(codes, prior, confusion)
    assert np.allclose(posterior, [[sum(p for t, p in joint.items() if t[u] == c)/total for c in range(3)] for u in range(3)]) and loglik == pytest.approx(math.log(total))
    assert np.allclose(posterior[2], prior)


def test_posterior_by_hand():
    # prior even, accuracies .9 and .6 disagree: .9*.4/(.9*.4 + .1*.6) = 6/7
    posterior, _ = class_posterior([[1], [0]], [.5, .5], [[[.9, .1], [.1, .9]], [[.6, .4], [.4, .6]]])
    assert np.allclose(posterior, [[1/7, 6/7]])


@pytest.mark.parametrize("seed", range(4))
def test_known_annotators_are_found(seed):
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 3, 1500)
    confusion = np.array([[[.9, .05, .05], [.1, .8, .1], [0, .3, .7]], [[.7, .2, .1], [.1, .6, .3], [.1, .1, .8]], [[1/3]*3]*3, [[.8, .1, .1], [.2, .8, 0], [.2, .2, .6]]])
    votes = synthetic_votes(truth, confusion, missing=.2, seed=seed)
    found = dawid_skene(votes)
    assert np.abs(found.confusion - confusion).max() < .15 and np.abs(found.accuracy - np.einsum("acc->ac", confusion).mean(1)).max() < .06
    assert (np.diff(found.history) > -1e-9).all() and len(found.history) > 3 and found.classes == [0, 1, 2]
    majority = [max(range(3), key=[line[u] for line in votes].count) for u in range(1500)]
    assert np.mean(np.array(found.labels) == truth) > np.mean(np.array(majority) == truth)


def test_em_stops_at_a_maximum():
    votes = synthetic_votes(np.random.default_rng(0).integers(0, 2, 60), [[[.9, .1], [.2, .8]], [[.7, .3], [.3, .7]], [[.6, .4], [.1, .9]]], seed=1)
    found, codes = dawid_skene(votes, n_steps=2000), np.array(votes)
    value = lambda prior, confusion: class_posterior(codes, prior, confusion)[1] + np.log(confusion).sum()
    best = value(found.prior, found.confusion)
    for step, (a, c) in itertools.product((-1e-3, 1e-3), itertools.product(range(3), range(2))):
        moved = found.confusion.copy()
        moved[a, c] += [step, -step]
        assert value(found.prior, moved) < best + 1e-7
    assert value(found.prior + [1e-3, -1e-3], found.confusion) < best + 1e-7 > value(found.prior - [1e-3, -1e-3], found.confusion)


def test_few_votes_do_not_make_perfect():
    votes = [["a", "b"]*20, ["a", "b"]*20, [None]*38 + ["a", "b"]]
    found = dawid_skene(votes)
    assert found.accuracy[2] == pytest.approx(2/3, abs=.01) and found.accuracy[0] > .9 # (1 + 1)/(1 + 2) with one pseudo-count
    with pytest.raises(ValueError, match="all votes are the same"): dawid_skene([[1, 1], [1, None]])
    with pytest.raises(ValueError, match="smoothing"): dawid_skene(votes, smoothing=0)


def test_synthetic_annotators_have_their_noise():
    truth = np.arange(30000) % 3
    confusion = np.array([[[.5, .3, .2], [0, 1, 0], [.1, .1, .8]], np.eye(3)])
    votes = synthetic_votes(truth, confusion, missing=.25, seed=0)
    for a, c, k in itertools.product(range(2), range(3), range(3)):
        said = [v for v, t in zip(votes[a], truth) if t == c and v is not None]
        assert np.mean(np.array(said) == k) == pytest.approx(confusion[a, c, k], abs=.02)
    assert np.mean([v is None for v in votes[0]]) == pytest.approx(.25, abs=.01) and votes == synthetic_votes(truth, confusion, missing=.25, seed=0)
    with pytest.raises(ValueError, match="sum to 1"): synthetic_votes([0], [[[.5, .6], [0, 1]]])


# --- scores from choices -----------------------------------------------------------------------------------------
def test_bradley_terry_by_hand():
    a, b = bradley_terry([(0, 1)]*3 + [(1, 0)], 2, l2=1e-9)
    assert a - b == pytest.approx(math.log(3), abs=1e-6) and a + b == pytest.approx(0, abs=1e-9)
    assert np.allclose(bradley_terry([(0, 1), (1, 2), (2, 0)], 3), 0) and np.isfinite(bradley_terry([(0, 1)]*50, 2)).all()
    # transitive odds: 0 beats 1 two to one, 1 beats 2 three to one: 0 is log 6 above 2
    scores = bradley_terry([(0, 1)]*2 + [(1, 0)] + [(1, 2)]*3 + [(2, 1)], 3, l2=1e-9)
    assert scores[0] - scores[2] == pytest.approx(math.log(6), abs=1e-5)
    assert np.argsort(-bradley_terry(ranking_pairs((3, 4, 2, 1)), 4)).tolist() == [3, 2, 0, 1]


def test_reward_is_at_the_maximum():
    draw = np.random.default_rng(0)
    X, c = draw.standard_normal((50, 4))*3, draw.exponential(size=50)
    w = fit_reward(X, l2=.3, weights=c)
    loss = lambda w: sum(c_*math.log(1 + math.exp(-x @ w)) for x, c_ in zip(X, c)) + .15*(w @ w)
    for i in range(4):
        e = 1e-5*np.eye(4)[i]
        assert (loss(w + e) - loss(w - e))/2e-5 == pytest.approx(0, abs=1e-5)
    assert np.allclose(fit_reward(np.repeat(X, 2, 0), l2=.6), fit_reward(X, l2=.3)) and np.allclose(fit_reward(X, weights=np.full(50, 2.)), fit_reward(np.repeat(X, 2, 0)))
    assert np.isfinite(fit_reward(1e3*np.abs(X), l2=1e-6)).all() # separable and far from 0
    far = np.array([[.16, -.03, -.02], [12.26, -27.17, -2.35], [6.27, -1.42, -32.48], [12.51, -.02, -17.45], [-.02, 6.28, .07], [18.27, -1.39, -.2], [.54, -.02, -.05], [3.92, -3.25, -2.52]])
    w = fit_reward(far, l2=8e-4) # whole Newton steps never settle here
    assert np.abs(far.T @ (1/(1 + np.exp(far @ w))) - 8e-4*w).max() < 1e-8
    for wrong in (dict(differences=np.full((2, 2), np.nan)), dict(differences=[1., 2.]), dict(differences=X, l2=0.)):
        with pytest.raises(ValueError, match="fit_reward"): fit_reward(**wrong)


@pytest.mark.slow
def test_same_reward_as_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    X = np.random.default_rng(1).standard_normal((80, 5)) + .4
    model = linear.LogisticRegression(C=1/.7, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(np.concatenate([X, -X]), [1]*80 + [0]*80, sample_weight=np.full(160, .5))
    assert np.allclose(fit_reward(X, l2=.7), model.coef_[0], atol=1e-5)


def test_accuracy_ties_are_not_right():
    # item 9
    assert pair_accuracy([1., 0.], [[1, 5], [-1, 5], [0, 5], [2, 5]]) == .5


def test_choices_have_their_noise():
    margins = np.full(20000, math.log(3))
    assert np.mean(noisy_choices(margins) == 1) == 1 and np.mean(noisy_choices(-margins) == -1) == 1
    assert np.mean(noisy_choices(margins, flip=.2) == 1) == pytest.approx(.8, abs=.01) and np.mean(noisy_choices(-margins, flip=.2) == 1) == pytest.approx(.2, abs=.01)
    assert np.mean(noisy_choices(margins, scale=1.) == 1) == pytest.approx(.75, abs=.01) and np.mean(noisy_choices(margins, scale=2.) == 1) == pytest.approx(.9, abs=.01)
    assert np.mean(noisy_choices(margins, flip=.1, scale=1.) == 1) == pytest.approx(.1 + .8*.75, abs=.01)


# --- what to label next ------------------------------------------------------------------------------------------
def test_disagreement_by_hand():
    assert np.allclose(disagreement([[math.log(3)], [-math.log(3)]], [[1.], [0.], [-1.]]), [.25, 0, .25])
    assert np.allclose(disagreement([[1., 2.], [1., 2.]], [[3., 4.]]), 0)
    assert disagreement([[50.], [90.]], [[1.]])[0] < 1e-9 # both are sure, whatever the size of the score
    members = fit_ensemble(np.random.default_rng(0).standard_normal((9, 3)))
    assert members.shape == (8, 3) and np.ptp(members, axis=0).min() > .01 and np.array_equal(members, fit_ensemble(np.random.default_rng(0).standard_normal((9, 3))))
    with pytest.raises(ValueError, match="2 or more"): fit_ensemble([[1.]], n_members=1)


def _world(seed, **noise):
    draw = np.random.default_rng(seed)
    w, pool, test = draw.standard_normal(10)/math.sqrt(10), draw.standard_normal((300, 10)), draw.standard_normal((1000, 10))
    return pool, noisy_choices(pool @ w, seed=seed, **noise), test*np.sign(test @ w)[:, None]


def test_every_pair_is_asked_once_and_both_ways_start_alike():
    pool, clicks, test = _world(0)
    curves = {}
    for how in ("random", "disagreement"):
        asked = []
        def choose(i):
            asked.append(list(i))
            return clicks[i]
        curves[how] = selection_curve(pool, choose, test, how, n_labels=37)
        flat = sum(asked, [])
        assert len(set(flat)) == len(flat) == 37 and [len(a) for a in asked] == [10, 5, 5, 5, 5, 5, 2] and [n for n, _ in curves[how]] == [10, 15, 20, 25, 30, 35, 37]
        if how == "disagreement":
            X, left = pool[asked[0]]*clicks[asked[0]][:, None], [i for i in range(300) if i not in asked[0]]
            spread = dict(zip(left, disagreement(fit_ensemble(X), pool[left])))
            assert sorted(asked[1]) == sorted(sorted(left, key=lambda i: -spread[i])[:5])
    assert curves["random"][0] == curves["disagreement"][0] and curves["random"] != curves["disagreement"]
    with pytest.raises(ValueError, match="'random'"): selection_curve(pool, clicks.__getitem__, test, "best")
    with pytest.raises(ValueError, match="300 pairs"): selection_curve(pool, clicks.__getitem__, test, n_labels=301)


def test_fewer_labels_than_random():
    needed = {how: [] for how in ("random", "disagreement")}
    for seed in range(6):
        pool, clicks, test = _world(seed, flip=.02)
        for how in needed: needed[how].append(labels_needed(selection_curve(pool, lambda i: clicks[i], test, how, 70, seed=seed), .88))
    assert np.median(needed["disagreement"]) + 5 <= np.median(needed["random"]), needed
    assert labels_needed([(10, .7), (15, .9), (20, .8)], .8) == 15 and labels_needed([], .8) == math.inf
    assert labels_needed([(10, .9), (15, .7), (20, .8), (25, .9)], .8) == 20 and labels_needed([(10, .9), (15, .7)], .8) == math.inf


def test_accuracy_falls_with_noise_and_rises_with_labels():
    found = {}
    for flip, n in itertools.product((0, .3), (20, 300)):
        runs = []
        for seed in range(6):
            pool, clicks, test = _world(seed, flip=flip)
            runs.append(pair_accuracy(fit_reward((pool*clicks[:, None])[:n]), test))
        found[flip, n] = np.mean(runs)
    assert found[0, 300] > found[0, 20] + .05 and found[.3, 300] > found[.3, 20] + .05 and found[0, 20] > found[.3, 20] and found[0, 300] > found[.3, 300] + .03
