"""All benches, peers interleaved, on an idle machine: python tests/bench/run.py [startup] [compiled] [sft] [dpo] [ppo] [evals] [--rounds 3] [--steps 12]

Prints a table and ratios; writes tests/bench/results/NAME.json with the machine, the versions and every figure. With --keep also data/results/bench_NAME.json, which a chapter shows.
"""
import argparse, json, os, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]


def child(script, *args):
    "Run a bench script alone and return the JSON of its last line."
    done = subprocess.run([sys.executable, HERE / script, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent.parent)})
    if done.returncode: sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine():
    "Processor, cores and versions, so that a figure can be placed."
    from importlib.metadata import version
    cpuinfo = Path("/proc/cpuinfo")
    cpu = next((l.split(":")[1].strip() for l in cpuinfo.read_text().splitlines() if l.startswith("model name")), "") if cpuinfo.exists() else ""
    import torch
    return dict(cpu=cpu or platform.processor(), cores=os.cpu_count(), amx=getattr(torch.cpu, "_is_amx_tile_supported", lambda: None)(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, python=platform.python_version(),
                **{p: version(p) for p in ("torch", "transformers", "peft", "trl")})


def table(rows):
    from rich.console import Console
    from rich.table import Table
    shown = Table(*rows[0])
    for r in rows: shown.add_row(*(str(v) for v in r.values()))
    Console().print(shown)


def startup(a):
    return child("startup.py")


def compiled(a):
    return child("compiled.py")


def sft(a):
    "TRL at both attentions and ours, in turn; the best TRL is the one compared with."
    from common import checkpoint
    model = checkpoint(tempfile.mkdtemp())
    sides = {"trl sdpa": ("trl_sft.py", model, "--steps", a.steps), "trl eager": ("trl_sft.py", model, "--steps", a.steps, "--attention", "eager"),
             "ftcourse": ("ours_sft.py", "--steps", a.steps)}
    runs = {name: [] for name in sides}
    for n in range(a.rounds):
        for name, call in sides.items():
            runs[name].append(child(*call))
            print(f"round {n + 1}: {name}: {runs[name][-1]['step_s']} s a step", flush=True)
    floor = child("floor.py", "--steps", a.steps)
    rows = []
    for name, rs in runs.items():
        step, best = statistics.median(r["step_s"] for r in rs), min(r["min_s"] for r in rs)
        rows.append(dict(name=name, step_s=round(step, 3), best_s=best, tokens_per_s=round(floor["supervised_tokens"] / step), peak_gb=max(r["peak_gb"] for r in rs)))
    table(rows)
    peer, ours = min(rows[:-1], key=lambda r: r["step_s"]), rows[-1]
    ratios = dict(throughput=round(peer["step_s"] / ours["step_s"], 2), throughput_of_best=round(min(r["best_s"] for r in rows[:-1]) / ours["best_s"], 2),
                  memory=round(ours["peak_gb"] / peer["peak_gb"], 2))
    print(f"against {peer['name']}: {ratios['throughput']} times the supervised tokens a second (fastest steps {ratios['throughput_of_best']}), {ratios['memory']} of its memory")
    print(f"floor {floor['floor_s']} s a step at {floor['peak_tflops']} TFLOP/s of bf16 matmul; ours takes {round(ours['step_s'] / floor['floor_s'], 1)} times that")
    spent = child("ours_sft.py", "--steps", 4, "--profile")
    print("where our time goes: " + ", ".join(f"{share:.0%} {kind}" for kind, share in spent.items()))
    return dict(rows=rows, ratios=ratios, floor=floor, spent=spent, runs=runs)


def dpo(a):
    "TRL at both attentions, references online and cached, and ours, in turn; then how the gain grows with the prompt's length and the replies."
    from common import checkpoint
    model = checkpoint(tempfile.mkdtemp())
    sides = {f"trl {attention}{cached}": ("trl_dpo.py", model, "--steps", a.steps, "--attention", attention, *cached.split()) for attention in a.attention for cached in ("", " --precompute")}
    sides |= {"ftcourse": ("ours_dpo.py", "--steps", a.steps), "ftcourse --cached": ("ours_dpo.py", "--steps", a.steps, "--cached")}
    runs = {name: [] for name in sides}
    for n in range(a.rounds):
        for name, call in sides.items():
            runs[name].append(child(*call))
            print(f"round {n + 1}: {name}: {runs[name][-1]['step_s']} s a step", flush=True)
    rows = [dict(name=rs[0]["name"], step_s=round(statistics.median(r["step_s"] for r in rs), 3), best_s=min(r["min_s"] for r in rs), peak_gb=max(r["peak_gb"] for r in rs)) for rs in runs.values()]
    table(rows)
    ratios = {}
    for kind in ("online", "cached"):
        peer, ours = min((r for r in rows if r["name"].startswith("trl") and r["name"].endswith(kind)), key=lambda r: r["step_s"]), next(r for r in rows if r["name"] == f"ftcourse {kind}")
        best = min(r["best_s"] for r in rows if r["name"].startswith("trl") and r["name"].endswith(kind))
        ratios[kind] = dict(times=round(peer["step_s"] / ours["step_s"], 2), times_of_best=round(best / ours["best_s"], 2), memory=round(ours["peak_gb"] / peer["peak_gb"], 2))
        print(f"{kind}: {ratios[kind]['times']} times as fast as {peer['name']} (fastest steps {ratios[kind]['times_of_best']}), {ratios[kind]['memory']} of its memory")
    floor = child("floor.py", "--steps", a.steps, "--pairs")
    print("floor", floor)
    return dict(rows=rows, ratios=ratios, floor=floor, spent=child("ours_dpo.py", "--steps", 4, "--cached", "--profile"), scaling=scaling(model, a.words, a.replies), runs=runs)


def scaling(model, words, replies, steps=4, pairs=4):
    "Pairs a second against TRL's, online, by prompt length and replies. TRL computes each pair alone, so that its time a pair, taken on steps of 4 pairs, doesn't depend on K."
    found = []
    for n in words:
        peer = child("trl_dpo.py", model, "--steps", steps, "--words", n, "--batch", pairs)["step_s"] / pairs
        for k in replies:
            ours = child("ours_dpo.py", "--steps", steps, "--words", n, "--replies", k, "--batch", pairs)["step_s"] / (pairs * k * (k - 1) // 2)
            found.append(dict(words=n, replies=k, trl_s=round(peer, 3), ours_s=round(ours, 4), ratio=round(peer / ours, 1)))
            print(f"{n} words, K = {k}: {found[-1]['ratio']} times TRL's pairs a second", flush=True)
    return found


def evals(a):
    "lm-eval's own engine and ours, on choices, perplexity and generation."
    from evals import compare
    result = compare(a, child)
    table([{k: v for k, v in row.items() if not k.endswith("figures")} for row in result["rows"]])
    return result


def ppo(a):
    "TRL 1.12, the last with PPO, and ours, an update at a time, in turn; then our rollouts beside model.generate."
    from common import checkpoint, trl112
    model, folder = checkpoint(tempfile.mkdtemp()), trl112(a.trl112)
    sides = {"trl 1.12": ("trl_ppo.py", model, "--trl112", folder, "--updates", a.updates), "ftcourse": ("ours_ppo.py", "--updates", a.updates)}
    runs = {name: [] for name in sides}
    for n in range(a.rounds):
        for name, call in sides.items():
            runs[name].append(child(*call))
            print(f"round {n + 1}: {name}: {runs[name][-1]['update_s']} s an update", flush=True)
    middle = lambda rs, key: round(statistics.median(r[key] for r in rs), 2)
    rows = [dict(name=name, update_s=middle(rs, "update_s"), best_s=min(r["best_s"] for r in rs), peak_gb=max(r["peak_gb"] for r in rs), first_ratio=[x for r in rs for x in r["first_ratio"]]) for name, rs in runs.items()]
    table([{k: v for k, v in r.items() if k != "first_ratio"} for r in rows])
    peer, ours = rows
    ratios = dict(times=round(peer["update_s"] / ours["update_s"], 2), times_of_best=round(peer["best_s"] / ours["best_s"], 2), memory=round(ours["peak_gb"] / peer["peak_gb"], 2))
    print(f"{ratios['times']} times as fast (fastest updates {ratios['times_of_best']}), {ratios['memory']} of the memory")
    parts = {k: middle(runs["ftcourse"], k) for k in ("rollout_s", "score_s", "train_s")}
    return dict(rows=rows, ratios=ratios, parts=parts, k3_min=min(r["k3_min"] for r in runs["ftcourse"]), rollout=child("rollout.py"), runs=runs)


BENCHES = dict(startup=startup, compiled=compiled, sft=sft, dpo=dpo, ppo=ppo, evals=evals)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHES)}; all of them by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"], help="of TRL's sides in the bench dpo")
    parser.add_argument("--words", type=int, nargs="+", default=[0, 96, 384], help="put before each prompt, in the bench dpo: about 0, 128 and 512 tokens")
    parser.add_argument("--replies", type=int, nargs="+", default=[2, 4, 8], help="to each prompt, in the bench dpo")
    parser.add_argument("--rows", type=int, default=120, help="questions in the bench evals; a quarter of them with shots")
    parser.add_argument("--updates", type=int, default=3, help="rollouts of a run in the bench ppo; the first is a warm-up")
    parser.add_argument("--trl112", help="a folder with TRL 1.12, for the bench ppo; without one it is fetched")
    parser.add_argument("--keep", action="store_true", help="keep the figures for the chapter that shows them")
    a = parser.parse_args()
    (HERE / "results").mkdir(exist_ok=True)
    for name in a.names or BENCHES:
        if name not in BENCHES: parser.error(f"no bench {name}; there are {', '.join(BENCHES)}")
        started = time.time()
        result = BENCHES[name](a)
        result = dict(bench=name, machine=machine(), seconds=round(time.time() - started), **result)
        (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        if a.keep: (HERE.parent.parent / "data" / "results" / f"bench_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({k: v for k, v in result.items() if k not in ("runs", "rows")}), flush=True)


if __name__ == "__main__": main()
