"""How good a reward model gets: by the number of labels, and by how many of them are wrong.

    python tests/studies/labels.py [--seeds 0 1] [--folder runs/studies/labels] [--tiny]

About a quarter of an hour on two cores. Each run is a process of its own and writes one file into the folder; what is there already is not run again. At the end all of it goes to
data/results/labels.json, which the chapter 4_align/rlhf reads.
"""
import time

from study import do, options, save

N_HELD, COUNTS, FLIPS, AT = 160, (64, 256, 768), (0.1, 0.25, 0.4), 256
TINY = dict(n_held=8, counts=(4, 8, 16), at=8)


def data(n_held):
    "Pairs to label, and held-out pairs of other prompts."
    from ftcourse.align.prefer import preference_rows
    from ftcourse.data.batches import split_rows
    rows = [r for r in preference_rows("preferences")[0] if r["chosen"] != r["rejected"]]
    train, held = split_rows(rows, (0.85, 0.15), seed=0)
    return train, held[:n_held]


def run(job, folder):
    "Train on so many labels, some of them turned round; which held-out pairs come out right, and how sure the model is of them."
    import random
    from ftcourse.align.reward import train_reward
    from ftcourse.align.rlhf import flip_pairs
    started = time.time()
    train, held = data(job["n_held"])
    rows = flip_pairs(random.Random(job["seed"]).sample(train, job["n_labels"]), job["flip"], seed=job["seed"])
    reward = train_reward(job["model"], rows, seed=job["seed"], progress=False)
    chosen, rejected = reward.pair_scores(held)
    return dict(right=(chosen > rejected).int().tolist(), margins=[round(m, 3) for m in (chosen - rejected).tolist()], seconds=round(time.time() - started, 1))


def main():
    parser = options(__doc__, "labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    a = parser.parse_args()
    model, sizes = ("tiny", TINY) if a.tiny else ("smollm2-135m", dict(n_held=N_HELD, counts=COUNTS, at=AT))
    import ftcourse.align.rlhf  # noqa: F401  imported once, shared by every fork
    settings = [(n, 0.0) for n in sizes["counts"][::-1]] + [(sizes["at"], f) for f in FLIPS]  # the long ones first
    runs = do([dict(n_labels=n, flip=f, seed=s, model=model, n_held=sizes["n_held"]) for n, f in settings for s in a.seeds], run, a.folder, a.workers)
    _, held = data(sizes["n_held"])
    longer = [int(len(r["chosen"][-1]["content"]) > len(r["rejected"][-1]["content"])) for r in held]
    save("labels", a.workers, runs, seeds=a.seeds, model=model, **sizes, flips=FLIPS, longer=longer, runs=runs)


if __name__ == "__main__": main()
