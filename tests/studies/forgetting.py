"""What a model forgets while it learns EmojiBot: full training, LoRA with two ranks, and replay for both, three seeds each; and two halves of the task one after the other.

    python tests/studies/forgetting.py [--workers 2] [--full-lr 1e-4] [--lora-lr 2e-3] [--folder runs/studies/forgetting] [--tiny]

About ten minutes on two cores. Each run is a process of its own and writes one file into the folder; what is there already is not run again. At the end all of it goes to
data/results/forgetting.json, which the chapter 3_tune/forgetting reads.
"""
import random, time

from study import do, options, save

SEEDS, SHARE, BATCH = (0, 1, 2), 0.25, 8
SIZES = {"smollm2-135m": dict(n_new=144, n_test=40, n_held=24, n_english=20), "tiny": dict(n_new=16, n_test=4, n_held=4, n_english=4)}


def arms(full_lr, lora_lr):
    "The methods by name. Both ranks have the same α/√r, as rsLoRA scales."
    full, small, large = dict(method="full", lr=full_lr), dict(method="lora", r=8, alpha=16, lr=lora_lr), dict(method="lora", r=64, alpha=45, lr=lora_lr)
    return {"full": dict(title="full", **full), "full_replay": dict(title="full + replay", share=SHARE, **full), "lora_8": dict(title="LoRA r=8", **small),
            "lora_8_replay": dict(title="LoRA r=8 + replay", share=SHARE, **small), "lora_64": dict(title="LoRA r=64", **large)}


def halves(sizes):
    "Test rows of the first and of the second half of the codes; none accepts a code of both."
    from ftcourse.tune.forgetting import CODES, new_domain
    first, second = CODES[::2], CODES[1::2]
    only = lambda a, b: [r for r in new_domain(a)[1] if not set(b) & set(r["acceptable"])][:sizes["n_test"]//2]
    return only(first, second), only(second, first)


def measure_of(tokenizer, sizes):
    "measure(model): both domains, and English that is neither."
    import math
    from ftcourse.data.batches import encode_rows
    from ftcourse.tune.forgetting import bits_per_byte, emoji_scores, greek, held_out_loss, old_domain
    first, second = halves(sizes)
    held = encode_rows(old_domain()[1][:sizes["n_held"]], tokenizer)
    english = [r["english"] for r in greek("test")][:sizes["n_english"]]
    def measure(model):
        loss, a, b = held_out_loss(model, held), emoji_scores(model, tokenizer, first), emoji_scores(model, tokenizer, second)
        return dict(old_loss=loss, perplexity=math.exp(loss), english=bits_per_byte(model, tokenizer, english), first=a["acceptable"], second=b["acceptable"],
                    **{k: (a[k] + b[k])/2 for k in a})
    return measure


def rows_of(codes, n, seed):
    "`n` training rows with these codes, drawn by the seed."
    from ftcourse.tune.forgetting import new_domain
    return random.Random(seed).sample(new_domain(codes)[0], n)


def tune(model, tokenizer, rows, measure, at, job):
    "Train on rows, measured after each share of the steps in `at`."
    from ftcourse.data.batches import encode_rows
    from ftcourse.tune.forgetting import watched
    from ftcourse.tune.trainer import Run
    run = Run(lr=job["lr"], batch_size=BATCH, n_epochs=1, seed=job["seed"], progress=False)
    n = run.n_steps(len(rows))
    return watched(model, encode_rows(rows, tokenizer), measure, sorted({round(s*n) for s in at}), run, tokenizer.pad_token_id)


def run(job, folder):
    "One run and its record."
    from ftcourse.models import load
    from ftcourse.tune.forgetting import CODES, mix_replay, old_domain
    from ftcourse.tune.sft import make_trainable
    started, sizes = time.time(), SIZES[job["model"]]
    model, tokenizer = load(job["model"])
    measure, n = measure_of(tokenizer, sizes), sizes["n_new"]
    make_trainable(model, job["method"], job.get("r", 8), job.get("alpha", 16), seed=job["seed"])
    if job["arm"] == "sequential":
        curve = tune(model, tokenizer, rows_of(CODES[::2], n//2, job["seed"]), measure, (0, 1), job)
        last = curve[-1]["step"]
        curve += [{**p, "step": last + p["step"]} for p in tune(model, tokenizer, rows_of(CODES[1::2], n//2, job["seed"]), measure, (1,), job)]
    else:
        rows = rows_of(CODES, n, job["seed"])
        if "share" in job: rows = mix_replay(rows, old_domain()[0], job["share"], job["seed"])
        curve = tune(model, tokenizer, rows, measure, (0, .25, .5, 1), job)
    return dict(curve=curve, seconds=round(time.time() - started, 1))


def main():
    parser = options(__doc__, "forgetting")
    parser.add_argument("--full-lr", type=float, default=1e-4, help="learning rate of full training")
    parser.add_argument("--lora-lr", type=float, default=2e-3, help="learning rate of LoRA")
    a = parser.parse_args()
    model, table = "tiny" if a.tiny else "smollm2-135m", arms(a.full_lr, a.lora_lr)
    job = lambda arm, seed, settings: dict(arm=arm, seed=seed, model=model, **{k: v for k, v in settings.items() if k != "title"})
    jobs = [job(arm, seed, settings) for arm, settings in table.items() for seed in SEEDS]
    later = [job("sequential", seed, table["lora_8"]) for seed in SEEDS]
    import ftcourse.tune.forgetting  # noqa: F401  imported once, shared by every fork
    records = do(jobs + later, run, a.folder, a.workers)
    save("forgetting", a.workers, records, seeds=SEEDS, model=model, share=SHARE, **SIZES[model], arms=table, runs=records[:len(jobs)], sequential=records[len(jobs):])


if __name__ == "__main__": main()
