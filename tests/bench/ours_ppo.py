"""Our side of the PPO bench: one reply of up to 48 tokens to each of 8 prompts, 4 epochs, a reward model. python ours_ppo.py [--updates 3] [--tokens 48]"""
import argparse, json, statistics

import torch

import ftcourse.align.ppo as P
from common import ALPHA, BATCH, LR, RANK, peak_gb, preferences
from ftcourse.align.reward import RewardModel, add_reward_head
from ftcourse.models import load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--updates", type=int, default=3, help="the first is a warm-up")
parser.add_argument("--tokens", type=int, default=48, help="longest reply")
a = parser.parse_args()

k3, score = [], P._Loop.score


def looked_at(*args):
    "The rollout's smallest k3, on its way."
    rollout = score(*args)
    k3.append(P.kl_estimates(rollout.token_logps, rollout.ref_token_logps)["k3"][rollout.reply_mask > 0].min().item())
    return rollout


P._Loop.score = looked_at
model, tokenizer = load("smollm2-135m", dtype=torch.bfloat16)
judge = RewardModel(add_reward_head(model), tokenizer)
bot = P.ppo("smollm2-135m", [r["prompt"] for r in preferences(BATCH * a.updates)], judge, dtype=torch.bfloat16, r=RANK, lora_alpha=ALPHA, lr=LR, n_updates=a.updates, n_prompts=BATCH,
            n_samples=1, minibatch=BATCH, n_epochs=4, max_new_tokens=a.tokens, progress=False)
parts = ("rollout_s", "score_s", "train_s")
times = [sum(h[p] for p in parts) for h in bot.history[1:]]
print(json.dumps(dict(name="ftcourse", updates=len(times), update_s=round(statistics.median(times), 2), best_s=round(min(times), 2), peak_gb=round(peak_gb(), 2),
                      **{p: round(statistics.median(h[p] for h in bot.history[1:]), 2) for p in parts}, first_ratio=[h["first_ratio"] for h in bot.history],
                      ratio=[round(h["ratio"], 5) for h in bot.history], k3_min=min(k3), tokens=[h["length"] * BATCH for h in bot.history])))
