"""What the studies share, on runs that do nothing."""
import json, os, sys

import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT/"tests"/"studies"))
import study  # noqa: E402  after the path


def double(job, folder):
    (folder/"ran.txt").open("a").write(f"{job['x']} {os.getpid()}\n")
    if job["x"] < 0: raise ValueError("a run that fails")
    return dict(y=2*job["x"], seconds=1.5)


def test_a_study_keeps_what_is_finished_and_goes_on(tmp_path, capfd):
    jobs = [dict(x=3, lr=1e-3), dict(x=1, lr=0.5, parameters=dict(w=2.0))]
    assert [study.file_name(j) for j in jobs] == ["lr=0.001_x=3.json", "lr=0.5_x=1_w=2.json"]
    found = study.do(jobs[:1], double, tmp_path/"new", workers=1)
    assert found == [dict(x=3, lr=1e-3, y=6, seconds=1.5)]
    with pytest.raises(SystemExit, match="'x': -1.*failed with exit code 1; what is finished is kept"): study.do([dict(x=-1)], double, tmp_path/"new", workers=1)
    assert "a run that fails" in capfd.readouterr().err
    found = study.do(jobs, double, tmp_path/"new", workers=2)
    assert [r["y"] for r in found] == [6, 2] and found[1]["parameters"] == {"w": 2.0}           # the jobs' order
    ran = [line.split() for line in (tmp_path/"new"/"ran.txt").read_text().splitlines()]
    assert [x for x, _ in ran] == ["3", "-1", "1"] and str(os.getpid()) not in {pid for _, pid in ran}  # each once, in another process
    assert sorted(p.suffix for p in (tmp_path/"new").iterdir()) == [".json", ".json", ".txt"]


def test_the_result_says_where_it_comes_from(tmp_path, monkeypatch):
    (tmp_path/"data"/"results").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["x.py", "--workers", "2"])
    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: type("Done", (), dict(stdout="abc1234\n")))
    monkeypatch.setattr(study, "ROOT", tmp_path)
    study.save("x", 2, [dict(seconds=1.4), dict(seconds=2.4), {}], runs=[1, "α"])
    text = (tmp_path/"data"/"results"/"x.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert found["command"] == "python tests/studies/x.py --workers 2" and found["commit"] == "abc1234" and found["seconds"] == 4 and "α" in text
    assert found["versions"]["n_threads"] == max(1, os.cpu_count()//2) and found["runs"] == [1, "α"] and found["machine"]
