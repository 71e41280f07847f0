"""What the studies share: runs in processes of their own, one file each, so that a study that was stopped goes on where it was; and the result file with where it comes from.

    from study import do, options, save      # before torch; all other imports stand inside functions

    a = options(__doc__, "rank").parse_args()
    records = do([dict(r=r, seed=s) for r in (1, 8) for s in (0, 1)], run, a.folder, a.workers)      # run(job, folder) -> dict
    save("rank", a.workers, records, runs=records)
"""
import argparse, json, multiprocessing, os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def options(doc, name, tiny=True):
    "The arguments that studies take; `tiny` says whether there is a tiny stand-in."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at once, each on its share of the cores")
    parser.add_argument("--folder", type=Path, default=ROOT/"runs"/"studies"/name, help="where each run's file goes")
    if tiny: parser.add_argument("--tiny", action="store_true", help="the tiny model and a few steps: tries the study and what reads its file (give it a folder of its own)")
    return parser


def n_threads(workers):
    "Each worker's share of the cores."
    return max(1, os.cpu_count()//workers)


def file_name(job):
    "The name of a job's file: its settings in the order of their names, those in `parameters` last."
    parts = [f"{k}={v}" for k, v in sorted(job.items()) if k != "parameters"]
    return "_".join(parts) + "".join(f"_{k}={v:g}" for k, v in job.get("parameters", {}).items()) + ".json"


def _one(job, run, folder, threads):
    "In a process of its own: run, and write the record whole or not at all."
    import torch
    torch.set_num_threads(threads)
    part = folder/f".{file_name(job)}.part"
    part.write_text(json.dumps({**job, **run(job, folder)}))
    part.replace(folder/file_name(job))


def do(jobs, run, folder, workers=2):
    "Run what isn't there yet, `workers` at once; the records of all jobs, in their order: the job's settings and what `run(job, folder)` returned."
    import torch, transformers, datasets  # noqa: F401  imported once, shared by every fork; nothing is computed here
    from tqdm import tqdm
    folder.mkdir(parents=True, exist_ok=True)
    todo, going, fork = [j for j in jobs if not (folder/file_name(j)).exists()], [], multiprocessing.get_context("fork")
    bar = tqdm(total=len(todo), unit="run")
    while todo or going:
        while todo and len(going) < workers:
            job = todo.pop(0)
            child = fork.Process(target=_one, args=(job, run, folder, n_threads(workers)))
            child.start()
            going.append((child, job))
        time.sleep(0.2)
        for child, job in [g for g in going if not g[0].is_alive()]:
            going.remove((child, job))
            bar.update()
            if child.exitcode: sys.exit(f"the run {job} failed with exit code {child.exitcode}; what is finished is kept, start again to go on")
    bar.close()
    return [json.loads((folder/file_name(j)).read_text()) for j in jobs]


def save(name, workers, records, **found):
    "Write data/results/NAME.json: command, commit, machine, versions and the seconds of all records, then what was found."
    from ftcourse.cli import _machine
    from ftcourse.tune.trainer import versions
    found = dict(command=f"python tests/studies/{name}.py " + " ".join(sys.argv[1:]), commit=subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
                 machine=_machine(), workers=workers, versions={**versions(), "n_threads": n_threads(workers)}, seconds=round(sum(r.get("seconds", 0) for r in records)), **found)
    path = ROOT/"data"/"results"/f"{name}.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(records)} runs, {found['seconds']} s of runs")
