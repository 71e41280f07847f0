"""HumanEval on the course's model: all 164 tasks, the likeliest answer as text and in the chat template, and four samples as text.

    python tests/studies/humaneval.py [--workers 2] [--tiny]

About ten minutes on two cores. Programs run in the sandbox of ftcourse.evals.code; where it can't prove its walls the study refuses to start. data/results/humaneval.json holds
a verdict for each sample, which the chapter 5_evals/code reads.
"""
import time

from study import do, options, save

JOBS = [dict(way="text", temperature=0.8), dict(way="text", temperature=0.0), dict(way="chat", temperature=0.0)]


def run(job, folder):
    "The verdicts of one way of asking."
    from ftcourse.data.sets import load_set
    from ftcourse.evals.code import Sandbox, evaluate_code, write_code
    from ftcourse.models import load
    sandbox, (model, tokenizer), start = Sandbox(), load(job["model"]), time.perf_counter()
    rows = load_set("humaneval")[:job["n_tasks"]]
    answers = write_code(model, tokenizer, rows, n_samples=4 if job["temperature"] else 1, max_new_tokens=job["max_new_tokens"],
                         temperature=job["temperature"], chat=job["way"] == "chat")
    found = evaluate_code(rows, answers, sandbox)
    return dict(verdicts=[[o.verdict for o in outcomes] for outcomes in found.outcomes], seconds=time.perf_counter() - start)


if __name__ == "__main__":
    a = options(__doc__, "humaneval").parse_args()
    setting = dict(model="tiny", n_tasks=8, max_new_tokens=8) if a.tiny else dict(model="smollm2-135m", n_tasks=164, max_new_tokens=128)
    records = do([{**setting, **job} for job in JOBS], run, a.folder, a.workers)
    save("humaneval", a.workers, records, **setting, runs=[{k: v for k, v in r.items() if k not in setting} for r in records])
