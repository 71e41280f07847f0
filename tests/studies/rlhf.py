"""RLHF from end to end on the polite task: SFT, a reward model, and from there PPO, DPO and best-of-n on the same pairs; judged by a second reward model that saw other pairs.

    python tests/studies/rlhf.py [--lr 4e-4] [--beta 0.05] [--updates 24] [--seeds 0 1] [--folder runs/studies/rlhf] [--tiny]

About half an hour on two cores. Each run is a process of its own and writes one file into the folder; what is there already is not run again. At the end all of it goes to
data/results/rlhf.json, which the chapter 4_align/rlhf reads. The proxy is the reward model that policies see, the gold one only judges.
"""
import math, time

from study import do, file_name, options, save

SIZES = {"smollm2-135m": dict(n_train=192, n_gold=640, n_judged=160, n_scale=64, n_prompts=48, n_pool=32, n_samples=16, n_tokens=32, n_tax=64, n_emoji=48, emoji_steps=24),
         "tiny": dict(n_train=16, n_gold=16, n_judged=8, n_scale=8, n_prompts=4, n_pool=3, n_samples=8, n_tokens=6, n_tax=4, n_emoji=4, emoji_steps=2)}
GOLD_SEED, BATCH, N_SHOWN = 100, 8, 8


def data(sizes):
    "Pairs to train on, other pairs for the gold judge, and held-out pairs; no prompt is in two of them."
    from ftcourse.align.prefer import preference_rows
    from ftcourse.data.batches import split_rows
    rows = [r for r in preference_rows("preferences")[0] if r["chosen"] != r["rejected"]]
    train, gold, held = split_rows(rows, (0.18, 0.59, 0.23), seed=0)
    return dict(train=train[:sizes["n_train"]], gold=gold[:sizes["n_gold"]], judged=held[:sizes["n_judged"]], prompts=[r["prompt"] for r in held[:sizes["n_prompts"]]])


def demonstrations(rows): return [dict(prompt=r["prompt"], completion=r["chosen"]) for r in rows]


def instructions(prompts):
    "These prompts with the answers of the instruction set: half of them polite, half of them not."
    from ftcourse.data.formats import to_messages
    from ftcourse.data.sets import load_set
    wanted = {str(p) for p in prompts}
    return [row for row in map(to_messages, load_set("instructions")) if str(row["messages"][:-1]) in wanted]


# --- the models, all on one base --------------------------------------------------------------------------------------
def opened(job):
    "A base with an adapter that does nothing yet."
    from ftcourse.models import load
    from ftcourse.tune.sft import make_trainable
    model, tokenizer = load(job["model"])
    make_trainable(model)
    return model, tokenizer


def reward_adapter(model, tokenizer, folder, scale=None):
    "The reward model in `folder`, taken off the base that it is read on."
    from ftcourse.align.reward import RewardModel, add_reward_head
    from ftcourse.align.rlhf import RewardAdapter
    from ftcourse.tune.trainer import load_trained
    load_trained(add_reward_head(model), folder)
    kept = RewardAdapter(RewardModel(model, tokenizer))
    del model.score
    if scale: kept.head.gain.fill_(scale["gain"]), kept.head.bias.fill_(scale["bias"])
    return kept


def sft_start(job, folder):
    "The supervised model of a seed, both judges, and the adapter's weights as they are now."
    import json
    from ftcourse.tune.lora import lora_parameters
    from ftcourse.tune.trainer import load_trained
    model, tokenizer = opened(job)
    pool = folder/file_name(pool_job(job))
    scales = json.loads(pool.read_text())["scales"] if pool.exists() else {}
    judges = {name: reward_adapter(model, tokenizer, folder/where, scales.get(name)) for name, where in (("proxy", f"proxy-{job['seed']}"), ("gold", "gold"))}
    load_trained(model, folder/f"sft-{job['seed']}")
    return model, tokenizer, judges, [p.detach().clone() for p in lora_parameters(model)]


# --- what is measured -------------------------------------------------------------------------------------------------
def tax(model, tokenizer, sizes):
    "Skills that nobody rewards: instruction answers as they were written, plain English, and the value of a Boolean expression."
    import torch
    from ftcourse.data.batches import encode_rows
    from ftcourse.data.sets import load_set
    from ftcourse.models import candidate_logps
    from ftcourse.tune.forgetting import bits_per_byte, greek, held_out_loss
    n, answers = sizes["n_tax"], instructions(data(sizes)["prompts"])
    sums = load_set("bbh/boolean_expressions")[:n]
    logps = torch.tensor([candidate_logps(model, tokenizer, r["input"], [" True", " False"]) for r in sums]).log_softmax(1)
    right = logps[range(len(sums)), [int(r["target"] == "False") for r in sums]]
    return dict(answers_perplexity=math.exp(held_out_loss(model, encode_rows(answers, tokenizer))), english_bits=bits_per_byte(model, tokenizer, [r["english"] for r in greek("test")][:n]),
                boolean_right=(right > math.log(0.5)).int().tolist(), boolean_nats=-right.mean().item())


def summed_logps(model, trees): # (n,) log-probabilities under the model as it is
    import torch
    from ftcourse.align.prefer import with_reference
    return torch.tensor([t.ref_logps[0] for t in with_reference(model, trees)])


def measure(model, tokenizer, judges, start, job):
    "One reply to each held-out prompt: both scores, distance from the supervised model, entropy, length, ends; skills; a few answers."
    from ftcourse.align.ppo import ended, reference
    from ftcourse.data.batches import Tree
    from ftcourse.models import _stop_ids, generate, sample_ids
    sizes = SIZES[job["model"]]
    prompts = data(sizes)["prompts"]
    drawn = sample_ids(model, tokenizer, prompts, sizes["n_tokens"], seed=1_000*job["seed"])
    trees = [Tree(p, (r,), ((1,)*len(r),), i) for i, (p, r) in enumerate(drawn)]
    lengths, now = [len(r) for _, r in drawn], summed_logps(model, trees)
    with reference(model, start): kl = now - summed_logps(model, trees)
    found = {}
    for name, judge in judges.items():
        with judge.on(model) as reward: found[name] = reward.score_ids(drawn).tolist()
    return dict(found, kl=kl.tolist(), lengths=lengths, entropy=(-now.sum()/sum(lengths)).item(), ended=ended([r for _, r in drawn], _stop_ids(model, tokenizer)).float().mean().item(),
                answers=generate(model, tokenizer, prompts[:N_SHOWN], max_new_tokens=sizes["n_tokens"]), tax=tax(model, tokenizer, sizes))


def peak_gb():
    import resource
    return round(1024*resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e9, 2)


# --- the runs ---------------------------------------------------------------------------------------------------------
def judged(reward, job):
    "Which held-out pairs a reward model gets right."
    chosen, rejected = reward.pair_scores(data(SIZES[job["model"]])["judged"])
    return (chosen > rejected).int().tolist()


def gold_run(job, folder):
    "The judge: more pairs, other ones, another seed, and the base that has seen none of the chosen replies."
    from ftcourse.align.reward import train_reward
    from ftcourse.tune.trainer import save_trained
    reward = train_reward(opened(job), data(SIZES[job["model"]])["gold"], seed=GOLD_SEED, progress=False)
    save_trained(reward.model, folder/"gold")
    return dict(right=judged(reward, job))


def start_run(job, folder):
    "Supervised training on the chosen replies, then the proxy: the same model, trained on the pairs."
    from ftcourse.align.reward import train_reward
    from ftcourse.tune.sft import finetune
    from ftcourse.tune.trainer import save_trained
    (model, tokenizer), rows, t0 = opened(job), data(SIZES[job["model"]])["train"], time.time()
    finetune((model, tokenizer), demonstrations(rows), lr=4e-4, n_epochs=1, batch_size=BATCH, seed=job["seed"], progress=False)
    save_trained(model, folder/f"sft-{job['seed']}")
    t1 = time.time()
    reward = train_reward((model, tokenizer), rows, seed=job["seed"], progress=False)
    save_trained(model, folder/f"proxy-{job['seed']}")
    return dict(sft_seconds=round(t1 - t0, 1), reward_seconds=round(time.time() - t1, 1), right=judged(reward, job))


def set_scale(judge, model, tokenizer, sizes):
    "Mean 0 and spread 1 over the supervised model's own replies to training prompts."
    from ftcourse.models import generate
    prompts = [r["prompt"] for r in data(sizes)["train"][:sizes["n_scale"]]]
    replies = generate(model, tokenizer, prompts, sizes["n_tokens"], temperature=1.0, seed=50_000)
    with judge.on(model) as reward: reward.normalise([dict(prompt=p, completion=[dict(role="assistant", content=r)]) for p, r in zip(prompts, replies)])
    return dict(gain=judge.head.gain.item(), bias=judge.head.bias.item())


def pool_run(job, folder):
    "Many replies of the supervised model to each prompt, with both scores: what best-of-n chooses from. The supervised model and the base measured as the others are."
    import torch
    from ftcourse.align.ppo import reference
    from ftcourse.data.batches import Tree
    from ftcourse.models import sample_ids
    sizes, (model, tokenizer, judges, start) = SIZES[job["model"]], sft_start(job, folder)
    scales = {name: set_scale(judge, model, tokenizer, sizes) for name, judge in judges.items()}
    K, t0 = sizes["n_samples"], time.time()
    drawn = sample_ids(model, tokenizer, [p for p in data(sizes)["prompts"][:sizes["n_pool"]] for _ in range(K)], sizes["n_tokens"], seed=100_000*(job["seed"] + 1))
    groups = [drawn[i:i+K] for i in range(0, len(drawn), K)]
    trees = [Tree(g[0][0], tuple(r for _, r in g), tuple((1,)*len(r) for _, r in g), i) for i, g in enumerate(groups)]
    pool = {}
    for name, judge in judges.items():
        with judge.on(model) as reward: pool[name] = reward.score_trees(trees, 4).view(-1, K).tolist()
    pool |= dict(lengths=[[len(r) for _, r in g] for g in groups], seconds=round(time.time() - t0, 1))
    found = dict(pool=pool, scales=scales, sft=measure(model, tokenizer, judges, start, job))
    with reference(model, [torch.zeros_like(w) for w in start]): found["base"] = measure(model, tokenizer, judges, start, job)
    return found


def ppo_run(job, folder):
    "PPO with the proxy as its reward. The gold judge looks on: it scores each rollout, and nobody hears what it says."
    from ftcourse.align.ppo import ppo
    sizes, (model, tokenizer, judges, start), watched, t0 = SIZES[job["model"]], sft_start(job, folder), [], time.time()
    proxy, gold, looking = judges["proxy"].reward(model), judges["gold"].reward(model), [0.0]

    def reward(prompts, replies):
        scores, t = proxy(prompts, replies), time.time()
        watched.append(dict(proxy=scores.mean().item(), gold=gold(prompts, replies).mean().item()))
        looking[0] += time.time() - t
        return scores
    ptx = instructions(r["prompt"] for r in data(sizes)["gold"])[:sizes["n_train"]] if job.get("ptx") else None
    history, stopped = [], None
    try: history = ppo((model, tokenizer), [r["prompt"] for r in data(sizes)["train"]], reward, ptx=ptx, n_updates=job["n_updates"], n_prompts=BATCH, n_samples=2, minibatch=4, n_epochs=2,
                       max_new_tokens=sizes["n_tokens"], lr=job["lr"], beta=job["beta"], seed=job["seed"], progress=False).history
    except FloatingPointError as e: stopped = str(e)
    seconds, peak = time.time() - t0 - looking[0], peak_gb()
    return dict(train_seconds=round(seconds, 1), peak_gb=peak, stopped=stopped, history=[{**h, **w} for h, w in zip(history, watched)], watched=watched, held=measure(model, tokenizer, judges, start, job))


def dpo_run(job, folder):
    "DPO on the same pairs, from the same supervised model."
    from ftcourse.align.prefer import prefer
    (model, tokenizer, judges, start), t0 = sft_start(job, folder), time.time()
    bot = prefer((model, tokenizer), data(SIZES[job["model"]])["train"], lr=job["lr"], beta=job["beta"], n_epochs=1, batch_size=BATCH, seed=job["seed"], progress=False)
    seconds, peak = time.time() - t0, peak_gb()
    return dict(train_seconds=round(seconds, 1), peak_gb=peak, losses=[h["loss"] for h in bot.history if "loss" in h], held=measure(model, tokenizer, judges, start, job))


def emoji_run(job, folder):
    "EmojiBot: SFT, then PPO with a rule as its reward."
    from ftcourse.align.ppo import ppo
    from ftcourse.data.sets import EMOJI_SYSTEM, load_set, score_emojibot
    from ftcourse.models import generate
    from ftcourse.tune.sft import finetune
    sizes, (model, tokenizer), tests = SIZES[job["model"]], opened(job), load_set("emojibot", "test")
    chat = lambda row: [dict(role="system", content=EMOJI_SYSTEM), dict(role="user", content=row["message"])]
    accepted, held = {r["message"]: r["acceptable"] for r in tests}, tests[:sizes["n_emoji"]]

    def reward(prompts, replies):
        scored = [score_emojibot(reply, accepted[prompt[-1]["content"]]) for prompt, reply in zip(prompts, replies)]
        return [1. if s["acceptable"] else .3 if s["format"] else 0. for s in scored]

    def asked():
        answers = generate(model, tokenizer, [chat(r) for r in held], max_new_tokens=24)
        return dict(rewards=reward([chat(r) for r in held], answers), answers=answers[:N_SHOWN])
    finetune((model, tokenizer), load_set("emojibot", "train"), max_steps=sizes["emoji_steps"], batch_size=BATCH, lr=1e-3, seed=job["seed"], progress=False)
    before = asked()
    bot = ppo((model, tokenizer), [chat(r) for r in tests[sizes["n_emoji"]:]], reward, n_updates=job["n_updates"], n_prompts=BATCH, n_samples=2, minibatch=4, n_epochs=2, max_new_tokens=24,
              lr=job["lr"], beta=job["beta"], seed=job["seed"], progress=False)
    return dict(history=bot.history, before=before, after=asked(), messages=[r["message"] for r in held[:N_SHOWN]])


RUNS = dict(gold=gold_run, start=start_run, pool=pool_run, ppo=ppo_run, dpo=dpo_run, emoji=emoji_run)


def run(job, folder):
    "What one run found, with its seconds."
    started = time.time()
    found = RUNS[job["method"]](job, folder)
    return dict(found, seconds=round(time.time() - started, 1))


def pool_job(job): return dict(method="pool", seed=job["seed"], model=job["model"])


def runs_of(a, model):
    "Each run with its name in the chapter. The ones that are meant to go wrong have one seed."
    first, n, lr = a.seeds[0], 4 if a.tiny else a.updates, 0.02 if a.tiny else a.lr  # the tiny model hardly moves at a usual rate
    ppo = lambda seed, **change: dict(dict(method="ppo", seed=seed, model=model, lr=lr, beta=a.beta, n_updates=n), **change)
    dpo = lambda seed, **change: dict(dict(method="dpo", seed=seed, model=model, lr=4e-4, beta=0.1), **change)
    return [("PPO + ptx", ppo(s, ptx=True)) for s in a.seeds] + [("PPO", ppo(s)) for s in a.seeds] + [
        ("PPO, β = 0", ppo(first, beta=0.0)), ("PPO, rate × 10", ppo(first, lr=10*lr))] + [("DPO", dpo(s)) for s in a.seeds] + [
        ("DPO, β / 5", dpo(first, beta=0.02)), ("DPO, rate × 10", dpo(first, lr=4e-3)), ("EmojiBot", ppo(first, method="emoji"))]


def main():
    parser = options(__doc__, "rlhf")
    parser.add_argument("--lr", type=float, default=4e-4, help="PPO's learning rate")
    parser.add_argument("--beta", type=float, default=0.05, help="PPO's price of a nat")
    parser.add_argument("--updates", type=int, default=24, help="PPO's updates of 8 prompts; 24 are one pass over the 192 prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    a = parser.parse_args()
    model = "tiny" if a.tiny else "smollm2-135m"
    job = lambda method, seed: dict(method=method, seed=seed, model=model)
    import ftcourse.align.ppo  # noqa: F401  imported once, shared by every fork
    gold, *starts = do([job("gold", GOLD_SEED)] + [job("start", s) for s in a.seeds], run, a.folder, a.workers)
    pools = do([pool_job(job("pool", s)) for s in a.seeds], run, a.folder, a.workers)
    names, jobs = zip(*runs_of(a, model))
    *runs, emoji = [dict(name=name, **r) for name, r in zip(names, do(list(jobs), run, a.folder, a.workers))]
    save("rlhf", a.workers, [gold, *starts, *pools, *runs, emoji], seeds=a.seeds, model=model, **SIZES[model], prompts=[p[-1]["content"] for p in data(SIZES[model])["prompts"][:N_SHOWN]],
         gold=gold, starts=starts, pools=pools, runs=runs, emoji=emoji)


if __name__ == "__main__": main()
