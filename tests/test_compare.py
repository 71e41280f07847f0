"""Comparing systems: intervals against SciPy and exact sums, the report against hostile answers and a real browser."""
import json, math, re, shutil, subprocess

import numpy as np
import pytest

from ftcourse.evals.compare import bootstrap_interval, bootstrap_means, compare, curves_svg, mcnemar, paired_difference, report

ROWS = [{"message": f"message {i}", "acceptable": ["(a)", "(b)"]} for i in range(6)]
def score(answer, row): return {"acceptable": answer in row["acceptable"], "leaked": bool(re.search("[A-Z]", answer))}
def toy(**systems): return compare(systems or {"base": ["(c)"] * 6, "sft": ["(a)", "(b)", "(c)", "(a)", "X", "(a)"]}, ROWS, score)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("k, n", [(1, 10), (7, 20), (140, 200), (499, 500)])
def test_interval_is_the_binomial_quantile(k, n, level):
    "n times the mean of a resample of k ones among n is Binomial(n, k/n): exact quantiles by math.comb."
    cdf = np.cumsum([math.comb(n, i) * (k/n)**i * (1 - k/n)**(n - i) for i in range(n + 1)])
    exact = np.searchsorted(cdf, [(1 - level)/2, (1 + level)/2]) / n
    got = bootstrap_interval([1] * k + [0] * (n - k), n=40_000, level=level)
    assert np.abs(np.subtract(got, exact)).max() <= 1/n + 1e-9  # a neighbouring row count at a quantile that falls between two


def test_interval_equals_scipys():
    from scipy.stats import bootstrap
    x = np.random.default_rng(3).exponential(2.0, 80)
    theirs = bootstrap((x,), np.mean, method="percentile", n_resamples=40_000, random_state=1).confidence_interval
    assert np.allclose(bootstrap_interval(x, n=40_000), theirs, atol=0.02)  # resampling noise: 0.22 s.e. / sqrt(40,000) at a 2.5 % tail


def test_paired_difference_equals_scipys():
    from scipy.stats import bootstrap
    rng = np.random.default_rng(5)
    a = rng.random(150) < 0.7
    b = np.where(rng.random(150) < 0.8, a, ~a)
    theirs = bootstrap((a * 1.0, b * 1.0), lambda a, b, axis=-1: a.mean(axis) - b.mean(axis), paired=True, method="percentile",
                       n_resamples=40_000, random_state=1).confidence_interval
    mean, low, high = paired_difference(a, b, n=40_000)
    assert mean == pytest.approx((a.sum() - b.sum()) / 150)
    assert np.allclose((low, high), theirs, atol=1/150 + 1e-9)


def test_coverage_is_near_95_percent():
    "Of 400 samples of 100 rows with a true mean of 0.6, about 95 % have it in their interval."
    rng = np.random.default_rng(0)
    inside = [low <= 0.6 <= high for low, high in (bootstrap_interval(rng.random(100) < 0.6, n=2000, seed=i) for i in range(400))]
    assert 0.91 <= np.mean(inside) <= 0.98


def test_interval_properties():
    x = np.random.default_rng(1).normal(size=50)
    low, high = bootstrap_interval(x, n=4000)
    assert np.allclose(bootstrap_interval(x + 10, n=4000), (low + 10, high + 10))
    assert np.allclose(bootstrap_interval(-x, n=4000), (-high, -low), atol=0.03)
    assert bootstrap_interval(x, n=4000) == (low, high) != bootstrap_interval(x, n=4000, seed=1)
    wide = bootstrap_interval(x, n=4000, level=0.99)
    assert wide[0] < low < x.mean() < high < wide[1]
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25) and bootstrap_interval([3]) == (3, 3)
    half = bootstrap_interval(np.tile(x, 4), n=4000)
    assert 0.4 < (half[1] - half[0]) / (high - low) < 0.6  # four times the rows: half the width


def test_long_lists_are_resampled_in_blocks():
    "200,000 rows: 20 resamples a block; all of them must be there, and all different."
    means = bootstrap_means(np.arange(200_000), n=50)
    assert means.shape == (50,) and len(set(means)) == 50
    assert abs(means.mean() - 99_999.5) < 5 * 57_735 / math.sqrt(200_000 * 50)


@pytest.mark.parametrize("values, words", [([], "shape"), ([[1, 2]], "shape"), ([1, float("nan"), 2], "row 1 is nan"), ([1, 2, float("inf")], "row 2 is inf")])
def test_bad_values_are_named(values, words):
    with pytest.raises(ValueError, match=words): bootstrap_interval(values)


def test_bad_level_and_lengths():
    with pytest.raises(ValueError, match="between 0 and 1"): bootstrap_interval([1, 0], level=95)
    with pytest.raises(ValueError, match="2 scores against 3"): paired_difference([1, 0], [1, 0, 1])


def test_figures_are_the_issue_s_json(tmp_path):
    c = toy()
    saved = c.save(tmp_path / "figures.json", seconds=1.5, peak_gb=0.5)
    assert json.loads((tmp_path / "figures.json").read_text()) == saved
    sft = saved["systems"]["sft"]
    assert set(saved) == {"systems", "seconds", "peak_gb"} and set(sft) == {"acceptable", "leaked", "n", "interval"}
    assert sft["acceptable"] == round(4/6, 4) and sft["leaked"] == round(1/6, 4) and sft["n"] == 6
    assert set(sft["interval"]) == {"acceptable", "leaked"} and all(0 <= lo <= hi <= 1 for lo, hi in sft["interval"].values())
    assert c.difference("sft", "base", "acceptable")[0] == pytest.approx(4/6)
    assert c.wrong_first("sft", "acceptable") == [2, 4, 0, 1, 3, 5]


def test_systems_may_be_functions():
    assert toy(sft=lambda rows: [r["acceptable"][0] for r in rows]).figures()["systems"]["sft"]["acceptable"] == 1


def test_wrong_number_of_answers_or_rows():
    with pytest.raises(ValueError, match="'sft' gave 5 answers to 6 rows"): toy(sft=["(a)"] * 5)
    with pytest.raises(ValueError, match="no rows"): compare({"a": []}, [], score)


def test_the_committed_study_holds_and_meets_its_target():
    "data/results/emojibot.json: real, complete, the same figures when its answers are scored again, and tuning beats the best prompt."
    from ftcourse.data.sets import data_dir, load_set, score_emojibot
    study, test = json.loads((data_dir() / "results" / "emojibot.json").read_text(encoding="utf-8")), load_set("emojibot", "test")
    assert study["model"] == "smollm2-135m" and study["command"] and study["machine"] and study["versions"] and set(study["seeds"]) == {"training", "resampling"}
    again = compare(study["answers"], test, lambda answer, row: score_emojibot(answer, row["acceptable"]))
    assert again.figures()["systems"] == study["systems"] and len(test) == 200
    assert study["systems"]["sft"]["format"] >= 0.98
    assert study["systems"]["sft"]["acceptable"] - study["systems"]["prompt"]["acceptable"] >= 0.25
    assert study["best_prompt"] == max(study["prompts"], key=study["prompts"].get)
    assert study["peak_gb"] < 4


HOSTILE = ["<script>alert(1)</script>", '"><img src=http://evil.example/x onerror=alert(1)>', "</td></tr></table></body>", "&lt;b&gt;",
           "\ud800 lone \u202e reversed", "javascript:alert(1)\x00\n' onclick='x"]


def hostile_page(folder):
    rows = [{"message": h, "acceptable": [h]} for h in HOSTILE]
    c = compare({"<base>": HOSTILE, "sft & co": HOSTILE[::-1]}, rows, score)
    return report(c, folder / "page.html", title="<b>title</b>", before="<base>", more={"<kinds>": HOSTILE}, curves={"<i>loss": {"<u>": [(0, 1), (1, float("nan")), (2, 3)]}}, notes=["<script>x"],
                  tables=[("<t>", "<p>", ["<h>"], [["<script>"]])], facts={"<k>": "<v>"})


def test_every_text_is_escaped(tmp_path):
    page = hostile_page(tmp_path).read_text(encoding="utf-8")
    tags = set(re.findall(r"<\s*/?\s*([a-zA-Z!][\w]*)", page))
    ours = {"!doctype", "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "div", "i", "b",
            "span", "svg", "path", "text", "tspan", "circle", "input", "select", "option", "button", "dl", "dt", "dd", "script"}
    assert tags <= ours and page.count("<script>") == 1 == page.count("</script>")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&amp;lt;b&amp;gt;" in page and "nan" not in page
    assert not re.search(r"""<[^>]*\s(src|href|on\w+)\s*=""", page), "no tag of ours loads or runs anything"
    assert "default-src 'none'" in page


def test_report_order_and_marks(tmp_path):
    page = report(toy(), tmp_path / "deep" / "r.html", focus="sft", measure="acceptable").read_text()
    order = [int(i) for i in re.findall(r'<td class="text" data-label="message" dir="auto">message (\d)', page)]
    assert order == [2, 4, 0, 1, 3, 5] and page.count('<tr class="wrong">') == 2
    assert "The 2 that sft gets wrong come first" in page and "[33.3%, 100.0%]" in page  # 4 of 6: 2.5 % of resamples have 2 or fewer


def test_mcnemar_equals_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar as theirs
    rng = np.random.default_rng(0)
    for n in (1, 7, 60, 400):
        a, b = rng.integers(0, 2, (2, n))
        both = [[((a == i) & (b == j)).sum() for j in (1, 0)] for i in (1, 0)]
        wins, losses, p = mcnemar(a, b)
        assert (wins, losses) == (both[0][1], both[1][0]) and p == pytest.approx(theirs(both, exact=True).pvalue, abs=1e-12)
    assert mcnemar([0.5, 0.9, 0.1], [0.4, 0.2, 0.1]) == (2, 0, 0.5)  # finer scores: who is higher
    with pytest.raises(ValueError, match="mcnemar: 2 scores against 3"): mcnemar([1, 0], [1, 0, 1])


def test_holm_equals_statsmodels():
    from statsmodels.stats.multitest import multipletests
    from ftcourse.exercises import solution
    ps = np.random.default_rng(1).uniform(size=9)**3
    assert np.allclose(solution("compare.2")(ps.tolist()), multipletests(ps, method="holm")[1])


def test_what_changed_is_told_row_by_row(tmp_path):
    rows, scores = [{"q": str(i)} for i in range(5)], dict(old="11001", new="10111")
    c = compare({name: list(s) for name, s in scores.items()}, rows, lambda answer, row: {"right": answer == "1"})
    assert c.changes("old", "new", "right") == {"better": [2, 3], "worse": [1], "same": [0, 4]}
    page = report(c, tmp_path / "r.html", before="old", more={"kind": list("vwxyz")}).read_text()
    assert "2 rows got better and 1 worse" in page and "p = 1)" in page  # 2 of 3 coins, either way: certain
    assert re.findall(r'<tr class="([^"]*)"', page) == ["wrong worse", "same", "better", "better", "same"]
    assert re.findall(r'data-label="kind" dir="auto">(.)', page) == list("wvxyz")
    with pytest.raises(ValueError, match="column 'kind' has 1 values for 5 rows"): report(c, tmp_path / "r.html", more={"kind": ["a"]})


@pytest.mark.slow
def test_a_click_sorts_and_filters(tmp_path, browser):
    rows = [{"q": f"question {n}"} for n in (10, 9, 2)]
    c = compare({"old": ["b", "x", "x"], "new": ["x", "a", "x"]}, rows, lambda answer, row: {"right": answer != "x"})
    page = browser.new_page()
    page.goto(report(c, tmp_path / "r.html", before="old").as_uri())
    first = lambda: [t.split()[-1] for t in page.locator(".answers tbody tr:visible td:first-child").all_inner_texts()]
    assert first() == ["10", "2", "9"]
    page.locator(".answers th button").first.click()
    assert first() == ["2", "9", "10"]  # as numbers
    page.locator(".answers th button").first.click()
    assert first() == ["10", "9", "2"]
    page.locator("#w").select_option("better")
    assert first() == ["9"] and page.locator("#n").inner_text() == "1 of 3 rows"
    page.locator("#w").select_option("worse")
    assert first() == ["10"]
    page.close()


def test_curves_leave_out_what_is_not_finite():
    assert "No curve" in curves_svg({"train": []}) and "No curve" in curves_svg({"train": [(1, float("inf"))]})
    svg = curves_svg({"train": [(0, 1.0), (1, float("nan")), (2, 0.0)], "validation": [(1, 0.5)]})
    assert "nan" not in svg and svg.count("<circle") == 1  # a single point is drawn as a dot


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_page_works_in_a_browser_without_network(tmp_path):
    "Headless Chromium with every host unreachable: our script runs (it counts the rows), the attack doesn't, phone width needs no scrolling sideways."
    page = hostile_page(tmp_path)
    probe = page.read_text(encoding="utf-8").replace("show()</script>", "show();document.title='wide '+(document.documentElement.scrollWidth>innerWidth)</script>")
    (tmp_path / "probe.html").write_text(probe, encoding="utf-8")
    dom = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=500,900",
                          "--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path}/probe.html"], capture_output=True, text=True, timeout=120).stdout
    assert "6 of 6 rows" in dom and "<title>wide false</title>" in dom and "<img" not in dom
