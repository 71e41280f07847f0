"""The papers' tables, typed a second time; the interval against scipy; the study's file."""
import json, math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st

from ftcourse.align.objectives import METHODS
from ftcourse.align.shootout import (MEASURES, differences, load_study, measures, plot_published, plot_study, published, published_table, runs_of, t_interval, t_quantile, verdict)
from ftcourse.data.sets import data_dir

# --- the tables, in the order and the notation of another list -------------------------------------------------------
TLDR = {"gpt4_s": "27 / 13 / 47", "gpt4_c": "32 / 12 / 54", "human": "43 / 17 / 58", "respondents": "122 / 199 / 272",
        "gpt4_s_human": "77 / 86 / 70", "gpt4_c_human": "79 / 85 / 67", "human_human": "– / 87 / 65"}
LLAMA3 = """SFT 26.0/25.3/1920; 22.3/596; 6.9/8.1. RRHF 37.9/31.6/1700; 28.8/467; 7.1/8.2. SLiC-HF 33.9/32.5/1938; 29.3/599; 6.9/8.1. DPO 48.2/47.5/2000; 35.2/609; 7.0/8.2.
 IPO 46.8/42.4/1830; 36.6/527; 7.2/8.2. CPO 34.1/36.4/2086; 30.9/604; 7.2/8.2. KTO 34.1/32.1/1878; 27.3/541; 7.2/8.2. ORPO 38.1/33.8/1803; 28.2/520; 7.2/8.3.
 R-DPO 48.0/45.8/1933; 35.1/608; 7.0/8.2. SimPO v0.1 44.7/40.5/1825; 33.8/504; 7.0/8.0. SimPO v0.2 53.7/47.5/1777; 36.5/530; 7.0/8.0."""
ZEPHYR = "SFT 57.2/39.0/30.1/46.3; DPO 58.2/40.0/30.1/44.1; ORPO λ=0.1 57.1/36.5/29.5/47.5; KTO β=0.1 λ_D=1 58.6/53.5/30.9/52.6; KTO one y per x 58.0/50.0/30.7/49.9"


def numbers(row, columns): return [row[c] for c in columns]


def test_summaries_are_as_printed():
    rows = published("tldr")
    assert [r["method"] for r in rows] == ["SFT", "PPO-1", "DPO"] and list(measures("tldr")) == list(TLDR)
    for column, line in TLDR.items(): assert [r[column] for r in rows] == [None if x == "–" else int(x) for x in line.split(" / ")], column


def test_llama3_is_as_printed():
    typed = [" ".join(part.split()).rstrip(".") for part in LLAMA3.replace("\n", " ").split(". ")]
    rows = published("llama3")
    assert len(typed) == len(rows) == 11
    for row, line in zip(rows, typed):
        method, line = line.rsplit(" ", 3)[0], line.rsplit(" ", 3)[1:]
        assert row["method"] == method and numbers(row, measures("llama3")) == [float(x) for part in line for x in part.strip(";").split("/")]


def test_zephyr_is_as_printed():
    typed = [line.rsplit(" ", 1) for line in ZEPHYR.split("; ")]
    assert [[r["method"], "/".join(f"{r[c]:.1f}" for c in measures("zephyr"))] for r in published("zephyr")] == typed


def test_column_sums():  # added up once by hand, apart from the lists above
    sums = {name: [round(sum(r[c] or 0 for r in published(name)), 1) for c in measures(name)] for name in ("tldr", "llama3", "zephyr")}
    assert sums["tldr"] == [87, 98, 118, 593, 233, 231, 152]
    assert sums["llama3"] == [445.5, 415.4, 20690, 344.0, 6105, 77.7, 89.7]
    assert sums["zephyr"] == [289.1, 219.0, 151.3, 240.4]


def test_who_labelled_and_who_is_last():
    rows = {r["method"]: r for r in published("llama3")}
    assert rows["SimPO v0.1"]["labels"] == "PairRM" and rows["SFT"]["labels"] is None
    assert {r["labels"] for m, r in rows.items() if m not in ("SFT", "SimPO v0.1")} == {"ArmoRM"}
    assert {m for m, r in rows.items() if r["mt_gpt4"] == min(x["mt_gpt4"] for x in rows.values())} == {"SimPO v0.1", "SimPO v0.2"}


def test_card_and_licence():
    folder = data_dir() / "published"
    card = (folder / "CARD.md").read_text(encoding="utf-8")
    for word in ("**Load:**", "**Origin:**", "**Licence:**", "**Known faults:**"): assert word in card
    for name in ("tldr", "llama3", "zephyr"): assert f"| `{name}.json` | {len(published(name))} |" in card
    assert len((folder / "LICENSE").read_text(encoding="utf-8")) > 900 and {f.name for f in folder.iterdir()} == {"CARD.md", "LICENSE", "tldr.json", "llama3.json", "zephyr.json"}


def test_a_caller_cannot_change_the_tables():
    published("tldr")[0]["human"] = 99
    measures("tldr").clear()
    assert published("tldr")[0]["human"] == 43 and len(measures("tldr")) == 7


def test_tables_and_bars():
    table = published_table("tldr").split("\n")
    assert table[2] == "| SFT | 27 | 32 | 43 | 122 | 77 | 79 | – |" and len(table) == 7 and "Rafailov" in table[-1]
    ax = plot_published("zephyr", "gsm8k")
    assert [b.get_width() for b in ax.patches] == [50.0, 53.5, 36.5, 40.0, 39.0] and ax.get_xlabel() == "GSM8K, exact match (%)"
    assert [b.get_width() for b in plot_published("tldr", "human_human").patches] == [65, 87]
    assert plot_published("llama3").get_xlabel() == measures("llama3")["lc"]
    with pytest.raises(ValueError, match="has no column 'mmlu'. It has: lc, wr"): plot_published("llama3", "mmlu")
    with pytest.raises(ValueError, match="There are: tldr, llama3, zephyr"): published("../results/emojibot")


# --- the interval ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_quantile_against_scipy(level):
    for df in (1, 2, 3, 4, 7, 19, 99, 999): assert t_quantile(df, level) == pytest.approx(scipy.stats.t.ppf((1 + level)/2, df), rel=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8).filter(lambda d: np.std(d) > 1e-3))
def test_interval_against_scipy(d):
    assert t_interval(d) == pytest.approx(scipy.stats.t.interval(0.95, len(d) - 1, loc=np.mean(d), scale=scipy.stats.sem(d)), rel=1e-4, abs=1e-4)
    mirrored = {"holds": "fails", "fails": "holds", "can't tell": "can't tell"}
    assert verdict([-x for x in d]) == mirrored[verdict(d)]


@pytest.mark.parametrize("d,tolerance,said", [
    ([1, 2, 3], 0, "can't tell"), ([1, 2, 3], 0.5, "holds"), ([1, 2, 3], 0.48, "can't tell"), ([2, 2, 2], 0, "holds"), ([0, 0, 0], 0, "can't tell"), ([0, 0, 0], 1e-9, "holds"),
    ([-1, -1, -1], 0.5, "fails"), ([-1, -1, -1], 1, "can't tell"), ([-3, -2, -1], 0, "can't tell"), ([-9, -8, -9], 1, "fails"), ([5, -5], 0, "can't tell"),
])
def test_verdicts_by_hand(d, tolerance, said): assert verdict(d, tolerance) == said  # 1, 2, 3: from -0.484 to 4.484


def test_refusals():
    with pytest.raises(ValueError, match="two differences or more"): verdict([1.0])
    with pytest.raises(ValueError, match="difference 1 isn't finite"): t_interval([1, math.nan, 2])
    with pytest.raises(ValueError, match="0 or more"): verdict([1, 2], tolerance=-1)


# --- the study ---------------------------------------------------------------------------------------------------------
def run(method, seed, **more): return {"method": method, "seed": seed, "accuracy": 0.5 + 0.1*seed, "length": 10.0 + seed, **more}


@pytest.fixture
def study(tmp_path):
    small = dict(runs=[run("simpo", 1, length=3.0), run("simpo", 0, length=7.0), run("dpo", 0), run("dpo", 1)], sft=[run("sft", 0), run("sft", 1)], kto_one=[run("kto", 0)], kto_two=[],
                 base={"length": 12.0, "answers": []})
    (tmp_path / "small.json").write_text(json.dumps(small))
    return load_study(tmp_path / "small.json")


def test_runs_and_differences(study):
    assert differences(study, "dpo", "simpo", "length") == [3.0, 8.0] and differences(study, "simpo", "dpo", "length") == [-3.0, -8.0]
    assert differences(study, "dpo", "sft", "accuracy") == [0, 0] and list(runs_of(study, "kto_one")) == [0]
    with pytest.raises(ValueError, match="has the seeds .0, 1., kto_one has .0."): differences(study, "dpo", "kto_one", "length")
    with pytest.raises(ValueError, match="no run of 'ppo'. It has: simpo, dpo"): runs_of(study, "ppo")
    with pytest.raises(ValueError, match="no run of 'kto_two'"): runs_of(study, "kto_two")


def test_plot_of_a_study(study):
    ax = plot_study(study, "length", ["dpo", "simpo"])
    dots = {t.get_text(): sorted(ax.lines[2*i].get_xdata()) for i, t in enumerate(ax.get_yticklabels())}
    assert dots == {"SimPO": [3, 7], "DPO": [10, 11]} and ax.get_xlabel() == MEASURES["length"]
    assert [list(line.get_xdata())[0] for line in ax.lines[1:4:2]] == [5, 10.5] and ax.lines[4].get_xdata()[0] == 12
    assert len(plot_study(study, "accuracy").lines) == 2*3  # SFT, SimPO, DPO; no line for a base that wasn't measured


def test_a_missing_study_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="tests/studies/nothing.py"): load_study("nothing")
    with pytest.raises(FileNotFoundError, match="no gone.json"): load_study(str(tmp_path / "gone.json"))


def test_the_committed_study_is_complete():
    study = load_study()
    seeds = study["seeds"]
    assert len(seeds) >= 3 and study["n_pairs"] == 256 and study["n_eval"] >= 64 and study["seconds"] > 0
    assert all(study[k] for k in ("command", "commit", "machine", "versions", "prompts"))
    for name in [*METHODS, "sft", "kto_one", "kto_two", "online"]:
        runs = runs_of(study, name)
        assert sorted(runs) == seeds, name
        assert all(math.isfinite(r[m]) for r in runs.values() for m in MEASURES if name != "online" or m not in ("length", "kl")), name
        assert all(3 <= len(r["answers"]) == len(study["base"]["answers"]) <= len(study["prompts"]) for r in runs.values() if name != "online"), name
    for name in METHODS: assert len({tuple(p["step"] for p in r["curve"]) for r in runs_of(study, name).values()}) == 1, name
    assert len({r["parameters"]["desirable_weight"] for r in study["kto_sweep"]}) >= 3
    tried = {name: {g["lr"] for g in study["grid"] if g["method"] == name} for name in ["sft", *METHODS]}
    assert all(len(rates) >= 3 and {r["lr"] for r in runs_of(study, name).values()} <= rates for name, rates in tried.items())
