"""One update of TRL 1.12's PPOTrainer, computed again by ours on its own rollout: tiny model, float32, LoRA. python trl_ppo_step.py [--trl112 FOLDER]

Writes data/results/ppo_step.json: the largest difference of each quantity. Where TRL has another convention, once by its convention ("TRL's") and once by ours ("ours").
"""
import argparse, copy, json, sys, tempfile
from pathlib import Path

import torch

from common import trl112

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--trl112", help="a folder with TRL 1.12 in it; without one it is fetched")
parser.add_argument("--out", default=Path(__file__).resolve().parents[2] / "data" / "results" / "ppo_step.json")
a = parser.parse_args()
trl112(a.trl112)

from datasets import Dataset  # noqa: E402  after the path
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402

from ftcourse.align.ppo import Policy, gae, kl_token_rewards, ppo_policy_loss, ppo_value_loss, ratio_metrics, reference, until_stop, whiten  # noqa: E402
from ftcourse.align.reward import load_reward  # noqa: E402
from ftcourse.data.batches import Tree  # noqa: E402
from ftcourse.models import load  # noqa: E402
from ftcourse.tune.lora import LoRALinear, add_lora, lora_parameters  # noqa: E402
from ftcourse.tune.trees import batch_trees  # noqa: E402

BATCH, TOKENS, TEMPERATURE, BETA, LAM, LR, VALUE_WEIGHT = 8, 12, .7, .05, .95, .5, .1


def folders():
    "The tiny model and a reward model as folders that both sides open."
    at, (model, tokenizer) = Path(tempfile.mkdtemp()), load("tiny")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # not the end token: with that TRL would not learn to end (item 10)
    model.config.pad_token_id = 0
    for x in (model, tokenizer): x.save_pretrained(at / "base")
    judge = AutoModelForSequenceClassification.from_pretrained(at / "base", num_labels=1, dtype=torch.float32)
    with torch.no_grad(): [p.add_(.02 * torch.randn_like(p)) for p in judge.parameters()]
    for x in (judge, tokenizer): x.save_pretrained(at / "judge")
    return at / "base", at / "judge", tokenizer


def ending_early(eos, pad):
    "TRL's rollout with an end put into half of the replies, which the tiny model wouldn't write, and no padding among the words; the logits are those of the changed replies."
    trl = sys.modules[PPOTrainer.__module__]
    generation = trl.batch_generation

    def changed(model, queries, n, pad_id, config):
        ids, n_prompt = generation(model, queries, n, pad_id, config)[0], queries.shape[1]
        ids[:, n_prompt:][ids[:, n_prompt:] == pad] = 5
        for i in range(0, len(ids), 2): ids[i, n_prompt + 2 + i] = eos
        return ids, trl.forward(model, ids, pad_id).logits[:, n_prompt - 1:-1] / (TEMPERATURE + 1e-7)
    trl.batch_generation = changed


def trl_update(base, judge, tokenizer):
    "What TRL's training loop holds at its two backward passes, its gradients there, and the policy and value model it started with."
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(r=2, lora_alpha=2, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    with torch.no_grad(): [p.mul_(.1) for name, p in policy.named_parameters() if "lora_B" in name]
    merged = copy.deepcopy(policy).merge_and_unload()
    value = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    value.model.load_state_dict(merged.model.state_dict())  # the values come from the policy's hidden states, as ours do
    with torch.no_grad(): value.score.weight.normal_()
    start = copy.deepcopy(policy), value.score.weight[0].detach().clone()
    tokenizer.padding_side = "left"
    rows = Dataset.from_list([dict(input_ids=tokenizer(f"number {i*i*i} is")["input_ids"]) for i in range(BATCH)])
    args = PPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_mini_batches=1, num_ppo_epochs=2, total_episodes=BATCH, response_length=TOKENS, stop_token="eos",
                     missing_eos_penalty=None, temperature=TEMPERATURE, kl_coef=BETA, lam=LAM, vf_coef=VALUE_WEIGHT, num_sample_generations=0, gradient_checkpointing=False, bf16=False, use_cpu=True,
                     report_to=[], save_strategy="no", disable_tqdm=True, seed=0)
    sgd = torch.optim.SGD([p for m in (policy, value) for p in m.parameters() if p.requires_grad], lr=LR)
    trainer = PPOTrainer(args=args, processing_class=tokenizer, model=policy, ref_model=None, value_model=value, train_dataset=rows, eval_dataset=rows,
                         reward_model=AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1, dtype=torch.float32), optimizers=(sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.)))
    ending_early(tokenizer.eos_token_id, tokenizer.pad_token_id)
    seen, backward = [], trainer.accelerator.backward

    def looked_at(loss, **kwargs):
        held = {k: v.detach().clone() for k, v in sys._getframe(1).f_locals.items() if torch.is_tensor(v)}
        held["adapter"] = [p.detach().clone() for p in policy.parameters() if p.requires_grad]
        backward(loss, **kwargs)
        held["gradient"], held["head_gradient"] = [p.grad.clone() for p in policy.parameters() if p.requires_grad], value.score.weight.grad[0].clone()
        seen.append(held)
    trainer.accelerator.backward = looked_at
    trainer.train()
    return seen, *start


def as_ours(base, peft_policy, head):
    "The same policy as ours: A, B and the value head copied."
    model, _ = load(base, dtype=torch.float32)
    add_lora(model, r=2, alpha=2)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            theirs = peft_policy.base_model.model.get_submodule(name)
            layer.A.data, layer.B.data = (getattr(theirs, f"lora_{x}")["default"].weight.detach().clone() for x in "AB")
    policy = Policy(model, TEMPERATURE)
    policy.value_weight.data = head
    return policy


def flat(tensors): return torch.cat([t.flatten() for t in tensors])


def main():
    torch.manual_seed(0)
    base, judge, tokenizer = folders()
    seen, peft_policy, head = trl_update(base, judge, tokenizer)
    first, second = seen
    policy, stop, pad = as_ours(base, peft_policy, head), {tokenizer.eos_token_id}, tokenizer.pad_token_id
    drawn = [(tuple(i for i in q if i != pad), until_stop(r, stop)) for q, r in zip(first["queries"].tolist(), first["responses"].tolist())]
    trees = lambda more: [Tree(q, (r + more[:TOKENS - len(r)],), ((1,) * len(r + more[:TOKENS - len(r)]),), i) for i, (q, r) in enumerate(drawn)]
    batch, one_more = (batch_trees(trees(more), policy.model) for more in ((), (0,)))  # one_more: a place behind the end, where TRL puts the score
    lay = lambda x: torch.nn.functional.pad(x, (0, TOKENS - x.shape[1]))
    mask, mask_p1 = lay(batch.reply_mask), lay(one_more.reply_mask)
    assert mask.bool().equal(~first["padding_mask"]) and mask_p1.bool().equal(~first["padding_mask_p1"]), "the replies end elsewhere"
    rows, adapter = [], lora_parameters(policy.model)

    def compare(what, way, mine, theirs, counts=None):
        far, size = (mine - theirs).abs(), theirs.abs()
        if counts is not None: far, size = far[counts > 0], size[counts > 0]
        rows.append({"quantity": what, "convention": way, "difference": far.max().item(), "largest": size.max().item()})
        print(rows[-1], flush=True)

    now, values = map(lay, policy(batch))
    values_p1 = lay(policy(one_more)[1])
    with torch.no_grad(), reference(policy.model): ref = lay(policy(batch)[0])
    scores = load_reward(judge, dtype=torch.float32).score_ids(drawn)
    compare("score", "same", scores, first["scores"])
    compare("log-probability", "same", now, first["logprobs"], mask)
    compare("reference log-probability", "same", ref, first["ref_logprobs"], mask)
    compare("value", "same", values, first["values"], mask)
    old, learnt = now.detach(), {}
    for way, m, v in (("ours", mask, values), ("TRL's", mask_p1, values_p1)):
        rewards = kl_token_rewards(scores, old, ref, m, BETA)
        raw, returns = gae(rewards, v.detach(), m, 1., LAM)
        n = mask.sum()
        advantages = whiten(raw, mask) * (1. if way == "ours" else ((n - 1) / n).sqrt())  # TRL divides the squares by n - 1
        learnt[way] = advantages, returns, m, v
        for what, mine, theirs in (("token reward", rewards, first["rewards"]), ("return", returns, first["returns"]), ("whitened advantage", advantages, first["advantages"])):
            compare(what, way, mine, theirs, mask if what == "whitened advantage" else mask_p1)
    for way, (advantages, returns, m, v) in learnt.items():
        policy_loss = ppo_policy_loss(now, old, advantages, mask)
        value_loss = ppo_value_loss(v, v.detach(), returns, m)
        compare("policy loss", way, policy_loss, first["pg_loss"])
        compare("value loss", way, value_loss, first["vf_loss"])
        gradient = flat(torch.autograd.grad(policy_loss, adapter, retain_graph=True))
        compare("gradient of the adapter", way, gradient, flat(by_name(first["gradient"], policy.model, peft_policy)))
        compare("gradient of the value head", way, torch.autograd.grad(VALUE_WEIGHT * value_loss, policy.value_weight, retain_graph=True)[0], first["head_gradient"])
    for p, g in zip(adapter, torch.autograd.grad(ppo_policy_loss(now, old, learnt["TRL's"][0], mask), adapter)): p.data -= LR * g
    compare("adapter after a step", "TRL's", flat(adapter).detach(), flat(by_name(second["adapter"], policy.model, peft_policy)))
    with torch.no_grad(): now = lay(policy(batch)[0])
    compare("policy loss of the second epoch", "TRL's", ppo_policy_loss(now, old, learnt["TRL's"][0], mask), second["pg_loss"])
    here, gap = ratio_metrics(now, old, mask), (now - old) * mask
    compare("mean ratio of the second epoch", "ours", here["ratio"], second["ratio"].mean())
    compare("mean ratio of the second epoch", "TRL's", gap.exp().mean(), second["ratio"].mean())
    compare("approximate KL of the second epoch", "ours", here["approx_kl"], .5 * (second["logprobs_diff"]**2).mean())
    compare("approximate KL of the second epoch", "TRL's", .5 * (gap**2).mean(), .5 * (second["logprobs_diff"]**2).mean())
    found = dict(model="tiny", dtype="float32", replies=BATCH, tokens=int(mask.sum()), ended=int((mask.sum(1) < TOKENS).sum()), rows=rows)
    Path(a.out).write_text(json.dumps(found, indent=1) + "\n")


def by_name(theirs, model, peft_policy):
    "TRL's list, in PEFT's order of parameters, in the order of `lora_parameters`."
    named = dict(zip((n for n, p in peft_policy.named_parameters() if p.requires_grad), theirs))
    return [named[f"base_model.model.{name}.lora_{x}.default.weight"] for name, layer in model.named_modules() if isinstance(layer, LoRALinear) for x in "AB"]


if __name__ == "__main__": main()
