"""Scoring beside lm-eval: what both sides do (`measure`), and the rounds that compare them (`compare`, called by run.py).

Works: `none` (five options, no shots), `same` (the same five shots before every question), `own` (each question draws its own), `perplexity` (long texts in windows), `generation`.
Both sides run lm-eval's own `simple_evaluate` on the same local tasks; the clock runs inside the model's calls.
"""
import argparse, json, re, statistics, tempfile, time
from importlib.metadata import version

from common import checkpoint, peak_gb

WORKS = {"none": ("rows/s", "five_objects", 0), "same": ("rows/s", "five_objects", 5), "own": ("rows/s", "own_shots", 5), "perplexity": ("texts/s", "texts", 0), "generation": ("texts/s", "sums", 0)}
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def arguments(description):
    "What the script of either side is told."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("--work", choices=WORKS, default="none")
    parser.add_argument("--limit", type=int, default=100, help="rows")
    parser.add_argument("--batch", type=int, default=16, help="rows (lm-eval) or texts written (ours) at a time")
    parser.add_argument("--window", type=int, default=1024, help="tokens that the model may read at once")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the processor time goes instead")
    return parser.parse_args()


def write_tasks(folder):
    "The works as tasks of lm-eval."
    from ftcourse.data.sets import load_set
    from ftcourse.evals.harness import local_task
    rows = []
    for r in load_set("bbh/logical_deduction_five_objects", "test"):
        question, options = r["input"].split("\nOptions:\n")
        letters, choices = zip(*re.findall(r"^\((\w)\) (.*)$", options, re.M))
        rows.append(dict(question=question, choices=list(choices), answer=letters.index(r["target"].strip("()"))))
    choice = dict(output_type="multiple_choice", doc_to_text="Question: {{question}}\nAnswer:", doc_to_choice="choices", doc_to_target="answer", metric_list=[dict(metric="acc"), dict(metric="acc_norm")])
    local_task(folder, "five_objects", rows[:-5], rows[-5:], **choice)
    local_task(folder, "own_shots", rows, **choice, fewshot_config={})
    stories = [r["output"] for r in load_set("instructions")]
    local_task(folder, "texts", [dict(text="\n".join(stories[40*i:40*i + 40])) for i in range(8)], output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}", metric_list=[dict(metric="byte_perplexity")])
    sums = [dict(question=r["question"], answer=r["answer"].split("#### ")[1]) for r in load_set("gsm8k", "test")[:100]]
    local_task(folder, "sums", sums, output_type="generate_until", doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="{{answer}}", generation_kwargs=dict(until=["Question:"], max_gen_toks=64),
               metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)])


def clocked(lm):
    "Time the model's calls; the list grows by the seconds of each."
    spent = []
    def timed(call):
        def run(*args, **kwargs):
            started = time.perf_counter()
            found = call(*args, **kwargs)
            spent.append(time.perf_counter() - started)
            return found
        return run
    for kind in KINDS: setattr(lm, kind, timed(getattr(lm, kind)))
    return spent


def measure(name, lm, a):
    "Run one work on one side and print a JSON line: rate, seconds, peak memory, the scores and every answer's log-probability."
    from ftcourse.evals.harness import choice_logps, run_tasks
    unit, task, shots = WORKS[a.work]
    spent, started = clocked(lm), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(folder)
        results = run_tasks(lm, folder, [task], shots, limit=a.limit)
    n = results["n-samples"][task]["effective"]
    figures = {k: round(v, 4) for k, v in results["results"][task].items() if k.endswith(",none") and isinstance(v, float)}
    print(json.dumps(dict(name=name, work=a.work, batch=a.batch, rows=n, unit=unit, rate=round(n / sum(spent), 3), seconds=round(sum(spent), 1), whole_s=round(time.perf_counter() - started, 1),
                          peak_gb=round(peak_gb(), 2), figures=figures, logps=choice_logps(results, task) if unit == "rows/s" else None)), flush=True)


def compare(a, child):
    "Both sides on every work, in turn; lm-eval at each of its batch sizes, of which the best is compared with. Then both in float32, and where our time goes."
    model, runs = checkpoint(tempfile.mkdtemp()), {}
    for n in range(a.rounds):
        for work, (limit, batches) in dict(none=(a.rows, (1, 16)), same=(a.rows // 4, (1, 4)), own=(a.rows // 4, (1, 4)), perplexity=(a.rows // 15 or 1, (1,)), generation=(a.rows // 4, (16,))).items():
            for script, batch in [("lm_eval_choice.py", b) for b in batches] + [("ours_choice.py", 16)]:
                done = child(script, model, "--work", work, "--limit", limit, "--batch", batch)
                runs.setdefault(work, {}).setdefault((done["name"], batch), []).append(done)
                print(f"round {n + 1}: {work}: {done['name']}, batch {batch}: {done['rate']} {done['unit']}, {done['peak_gb']} GB", flush=True)
    rows = [_row(work, found) for work, found in runs.items()]
    exact = {script: child(script, model, "--limit", 20, "--batch", 4, "--float32")["logps"] for script in ("lm_eval_choice.py", "ours_choice.py")}
    truth = sum(exact["lm_eval_choice.py"], [])
    far = lambda logps: [abs(x - t) for x, t in zip(sum(logps[:20], []), truth)]
    mean = lambda side: round(statistics.mean(far(next(rs[0]["logps"] for (name, _), rs in runs["none"].items() if name == side))), 4)
    distance = dict(lm_eval=mean("lm-eval"), ours=mean("ftcourse"), float32=max(far(exact["ours_choice.py"])))
    print("mean distance from float32", distance)
    spent = {work: child("ours_choice.py", model, "--work", work, "--limit", 24, "--profile") for work in ("none", "same")}
    plain = {work: [{k: v for k, v in r.items() if k != "logps"} for rs in found.values() for r in rs] for work, found in runs.items()}
    return dict(model="SmolLM2-135M-Instruct, bfloat16", lm_eval=version("lm_eval"), rows=rows, distance=distance, spent=spent, runs=plain)


def _row(work, found):
    "Medians of both sides of a work; lm-eval's at its best batch size."
    middle = {key: statistics.median(r["rate"] for r in rs) for key, rs in found.items()}
    best = max((key for key in middle if key[0] == "lm-eval"), key=middle.get)
    ours = next(key for key in middle if key[0] == "ftcourse")
    top = lambda key, name: max(r[name] for r in found[key])
    return dict(work=work, unit=found[ours][0]["unit"], lm_eval=middle[best], ours=middle[ours], ratio=round(middle[ours] / middle[best], 1), ratio_of_best=round(top(ours, "rate") / top(best, "rate"), 1),
                lm_eval_batch=best[1], lm_eval_gb=top(best, "peak_gb"), ours_gb=top(ours, "peak_gb"), lm_eval_figures=found[best][0]["figures"], ours_figures=found[ours][0]["figures"])
