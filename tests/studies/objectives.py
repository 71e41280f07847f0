"""Every preference objective on the same 256 pairs: a grid of three learning rates at one seed, then two more seeds at the best.

    python tests/studies/objectives.py [--pairs 256] [--methods dpo simpo ...] [--rates 1e-4 4e-4 1.6e-3] [--folder runs/studies/objectives]

About an hour on two cores. Each run is a process of its own and writes one file into the folder; what is there already is not run again. At the end all of it goes to
data/results/objectives.json, which the chapter 4_align/shootout reads.
"""
import json, time

from study import do, options, save

SEEDS, N_HELD, N_CURVE, N_PROMPTS, N_TOKENS, BATCH = (0, 1, 2), 64, 16, 12, 48, 8


def data(n_pairs):
    "Training pairs, held-out pairs of other prompts, and held-out prompts to answer."
    from ftcourse.align.prefer import preference_rows
    from ftcourse.data.batches import split_rows
    rows = [r for r in preference_rows("preferences")[0] if r["chosen"] != r["rejected"]]
    train, _, held = split_rows(rows, (0.6, 0.0, 0.4), seed=0)
    return train[:n_pairs], held[:N_HELD], [r["prompt"] for r in held[:N_PROMPTS]]


def held_out(model, tokenizer, rows, path=None):
    "Log-probabilities of both replies of the held-out pairs, (n, 2), and their lengths."
    import torch
    from ftcourse.align.prefer import preference_trees, with_reference
    trees = with_reference(model, preference_trees(rows, tokenizer), tokenizer.pad_token_id, path)
    return torch.tensor([t.ref_logps for t in trees]), torch.tensor([[sum(m) for m in t.masks] for t in trees]).float()


def measures(before, after, lengths):
    "What training did to the held-out pairs; log-probabilities (n, 2) of chosen and rejected."
    change = after - before
    ratio, likelihood = change[:, 0] - change[:, 1], (after/lengths)[:, 0] - (after/lengths)[:, 1]
    return dict(margin=ratio.mean().item(), accuracy=(ratio > 0).float().mean().item(), likelihood_accuracy=(likelihood > 0).float().mean().item(),
                reward_likelihood_agreement=((ratio > 0) == (likelihood > 0)).float().mean().item(),
                chosen_logps_change=change[:, 0].mean().item(), rejected_logps_change=change[:, 1].mean().item())


def curve(history, before):
    "The first held-out pairs by step, from before the first one. KTO logs no log-probabilities of a pair's sides, only the margin."
    found = [{k.removeprefix("eval_"): h[k] for k in ("step", "eval_chosen_logps", "eval_rejected_logps", "eval_margin") if k in h} for h in history if "eval_loss" in h]
    start = dict(step=0, margin=0.0, chosen_logps=before[:, 0].mean().item(), rejected_logps=before[:, 1].mean().item())
    return [{k: start[k] for k in found[0]}, *found]


def unpaired(rows, seed):
    "One answer a prompt: the chosen one of half of them, the rejected one of the others."
    import random
    good = set(random.Random(seed).sample(range(len(rows)), len(rows)//2))
    return [dict(prompt=r["prompt"], completion=r["chosen" if i in good else "rejected"], label=i in good) for i, r in enumerate(rows)]


def train(job, folder):
    "Train one model as `job` says; the model, its tokenizer, history and seconds."
    from ftcourse.align.prefer import prefer
    from ftcourse.models import load
    from ftcourse.tune.sft import finetune
    rows, held, _ = data(job["pairs"])
    model, started = load("smollm2-135m"), time.time()
    common = dict(lr=job["lr"], seed=job["seed"], n_epochs=1, progress=False)
    if job["method"] == "sft":
        bot = finetune(model, [dict(prompt=r["prompt"], completion=r["chosen"]) for r in rows], batch_size=BATCH, **common)
    else:
        if job.get("rows") == "one": rows = unpaired(rows, job["seed"])
        same = ["kto", job["seed"], job.get("rows")] if job["method"] == "kto" else ["pairs"]  # runs that ask the same reference
        bot = prefer(model, rows, objective=job["method"], batch_size=BATCH, eval_data=held[:N_CURVE] if job.get("curve") else None, eval_every=4, reference=job.get("reference", "auto"),
                     cache=folder/("reference-" + "-".join(map(str, [*same, job["pairs"], bool(job.get("curve"))])) + ".safetensors"), **job.get("parameters", {}), **common)
    return bot, time.time() - started


def run(job, folder):
    "What one run found."
    import resource
    from ftcourse.models import load
    _, held, prompts = data(job["pairs"])
    model, tokenizer = load("smollm2-135m")
    before, lengths = held_out(model, tokenizer, held, folder/"held-out.safetensors")
    found = {}
    if job["method"] == "base": bot, base = None, (model, tokenizer)
    else:
        del model
        bot, seconds = train(job, folder)
        after, _ = held_out(bot.model, tokenizer, held)
        found |= measures(before, after, lengths) | dict(seconds=round(seconds, 1), peak_gb=round(1024*resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e9, 2))
        if job.get("curve"): found["curve"] = curve(bot.history, before[:N_CURVE])
    if job.get("answers"):
        from ftcourse.align.prefer import sampled_kl
        from ftcourse.models import generate
        model, tokenizer = (bot.model, bot.tokenizer) if bot else base
        answers = generate(model, tokenizer, prompts, max_new_tokens=N_TOKENS)
        found |= dict(length=sum(len(tokenizer(a)["input_ids"]) for a in answers)/len(answers), answers=answers[:8])
        if bot: found["kl"], found["kl_se"] = sampled_kl(model, tokenizer, prompts, max_new_tokens=N_TOKENS, seed=job["seed"])
    return found


def best(runs):
    "The lowest rate whose accuracy is within two points of the best."
    top = max(r["accuracy"] for r in runs)
    return min((r for r in runs if r["accuracy"] >= top - 0.02), key=lambda r: r["lr"])


def main():
    parser = options(__doc__, "objectives", tiny=False)
    parser.add_argument("--pairs", type=int, default=256, help="to train on")
    parser.add_argument("--methods", nargs="+", help="of the objectives; all of them by default")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 4e-4, 1.6e-3], help="learning rates of the grid")
    a = parser.parse_args()
    from ftcourse.align.objectives import METHODS
    job = lambda method, lr, seed, **more: dict(method=method, lr=lr, seed=seed, pairs=a.pairs, **more)
    go = lambda jobs: [{k: v for k, v in r.items() if k != "pairs"} for r in do(jobs, run, a.folder, a.workers)]
    names = ["sft", *(a.methods or METHODS)]
    full = lambda m, lr, seed: job(m, lr, seed, answers=True, curve=m != "sft")
    grid = go([full(m, lr, SEEDS[0]) for m in names for lr in a.rates])
    rate = {m: best([r for r in grid if r["method"] == m])["lr"] for m in names}
    runs = go([full(m, rate[m], seed) for m in names for seed in SEEDS])
    online = go([job("dpo", rate["dpo"], seed, reference="online") for seed in SEEDS])
    weighed = [{**r, "parameters": {"desirable_weight": 1.0}} for r in runs if r["method"] == "kto"]
    sweep = weighed + go([job("kto", rate["kto"], seed, answers=True, parameters={"desirable_weight": w}) for w in (0.5, 2.0) for seed in SEEDS])
    one = go([job("kto", rate["kto"], seed, rows="one", answers=True) for seed in SEEDS])
    base, = go([job("base", 0, 0, answers=True)])
    all_runs = {json.dumps(r, sort_keys=True): r for r in grid + runs + online + sweep[len(weighed):] + one}.values()
    save("objectives", a.workers, all_runs, seeds=SEEDS, n_pairs=a.pairs, n_eval=N_HELD, prompts=[p[-1]["content"] for p in data(a.pairs)[2]], base=base,
         grid=[{k: v for k, v in r.items() if k not in ("curve", "answers")} for r in grid], sft=[r for r in runs if r["method"] == "sft"],
         runs=[r for r in runs if r["method"] != "sft"], online=online, kto_sweep=sweep, kto_one=one, kto_two=[r for r in runs if r["method"] == "kto"])


if __name__ == "__main__": main()
