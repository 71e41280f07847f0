"""Plausible wrong answers to the chapter on direct preference optimisation."""
import math

from torch.nn import functional as F


def _loss(logratios, beta): return -F.logsigmoid(beta*(logratios[0] - logratios[1]))

def _unmasked(token_logps, ref_token_logps, reply_mask, beta): return _loss((token_logps - ref_token_logps).sum(-1), beta)
def _mask_on_the_policy_only(token_logps, ref_token_logps, reply_mask, beta): return _loss((token_logps*reply_mask - ref_token_logps).sum(-1), beta)
def _mask_upside_down(token_logps, ref_token_logps, reply_mask, beta): return _loss(((token_logps - ref_token_logps)*(1 - reply_mask)).sum(-1), beta)
def _masked_mean(token_logps, ref_token_logps, reply_mask, beta): return _loss(((token_logps - ref_token_logps)*reply_mask).sum(-1)/reply_mask.sum(-1), beta)
def _mask_of_the_chosen(token_logps, ref_token_logps, reply_mask, beta): return _loss(((token_logps - ref_token_logps)*reply_mask[0]).sum(-1), beta)

def _means(chosen, rejected, ref_chosen, ref_rejected, beta):
    a, b, c, d = (sum(x)/len(x) for x in (chosen, rejected, ref_chosen, ref_rejected))
    return math.log1p(math.exp(-beta*((a - c) - (b - d))))
def _no_reference(chosen, rejected, ref_chosen, ref_rejected, beta): return math.log1p(math.exp(-beta*(sum(chosen) - sum(rejected))))
def _wrong_way_round(chosen, rejected, ref_chosen, ref_rejected, beta):
    return math.log1p(math.exp(beta*((sum(chosen) - sum(ref_chosen)) - (sum(rejected) - sum(ref_rejected)))))
def _policy_by_sums_only(chosen, rejected, ref_chosen, ref_rejected, beta):
    return math.log1p(math.exp(-beta*((sum(chosen) - sum(ref_chosen)/len(ref_chosen)) - (sum(rejected) - sum(ref_rejected)/len(ref_rejected)))))

def _rolled_after(logratio, prompts, replies):
    done = [logratio(x, y) for x, y in zip(prompts, replies)]
    return max(0, sum(done[-1:] + done[:-1])/len(done))
def _never_below_0_each(logratio, prompts, replies): return sum(max(0, logratio(x, y)) for x, y in zip(prompts, replies[-1:] + replies[:-1]))/len(prompts)
def _not_clamped(logratio, prompts, replies): return sum(logratio(x, y) for x, y in zip(prompts, replies[-1:] + replies[:-1]))/len(prompts)
def _backwards(logratio, prompts, replies): return max(0, sum(logratio(x, y) for x, y in zip(prompts, replies[::-1]))/len(prompts))
def _other_way(logratio, prompts, replies): return max(0, sum(logratio(x, y) for x, y in zip(prompts, replies[1:] + replies[:1]))/len(prompts))

WRONG = {"dpo.1": [_unmasked, _mask_on_the_policy_only, _mask_upside_down, _masked_mean, _mask_of_the_chosen],
         "dpo.2": [_means, _no_reference, _wrong_way_round, _policy_by_sums_only],
         "dpo.3": [_rolled_after, _never_below_0_each, _not_clamped, _backwards, _other_way]}
