"""The peer: the last TRL with PPO, 1.12. python trl_ppo.py MODEL_FOLDER [--trl112 FOLDER] [--updates 3] [--tokens 48]

Policy with LoRA, reference with the adapter off; value and reward models are full sequence-classification models, as its own examples have them.
"""
import argparse, json, statistics, sys, tempfile, time

import torch

from common import ALPHA, BATCH, LR, RANK, peak_gb, preferences, trl112

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("--trl112", help="a folder with TRL 1.12 in it; without one it is fetched")
parser.add_argument("--updates", type=int, default=3, help="the first is a warm-up")
parser.add_argument("--tokens", type=int, default=48, help="longest reply")
a = parser.parse_args()
trl112(a.trl112)

from datasets import Dataset  # noqa: E402  after the path
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402

tokenizer = AutoTokenizer.from_pretrained(a.model, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16)
with_head = lambda: AutoModelForSequenceClassification.from_pretrained(a.model, num_labels=1, dtype=torch.bfloat16)
ids = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=True)["input_ids"] for r in preferences(BATCH * a.updates)]
data = Dataset.from_list([dict(input_ids=x) for x in ids])
args = PPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_mini_batches=1, num_ppo_epochs=4, total_episodes=BATCH * a.updates, response_length=a.tokens,
                 stop_token="eos", missing_eos_penalty=1.0, temperature=1.0, learning_rate=LR, local_rollout_forward_batch_size=BATCH, num_sample_generations=0, gradient_checkpointing=False,
                 bf16=True, use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, seed=0)
trainer = PPOTrainer(args=args, processing_class=tokenizer, model=model, ref_model=None, reward_model=with_head(), value_model=with_head(), train_dataset=data, eval_dataset=data,
                     peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
marks, ratios, first, log, backward = [], [], [], trainer.log, trainer.accelerator.backward


def logged(metrics, *args, **kwargs):
    marks.append(time.perf_counter())
    ratios.append(metrics["val/ratio"])
    return log(metrics, *args, **kwargs)


def looked_at(loss, **kwargs):
    "The masked mean of the ratios on the first minibatch of each update, out of the training loop's own variables."
    seen = sys._getframe(1).f_locals
    if seen["ppo_epoch_idx"] == 0: first.append(seen["ratio"].detach()[~seen["padding_mask"][seen["micro_batch_inds"]]].mean().item())
    return backward(loss, **kwargs)


trainer.log, trainer.accelerator.backward = logged, looked_at
trainer.train()
times = [after - before for before, after in zip(marks, marks[1:])]
print(json.dumps(dict(name="trl 1.12", updates=len(times), update_s=round(statistics.median(times), 2), best_s=round(min(times), 2), peak_gb=round(peak_gb(), 2),
                      first_ratio=[round(x, 5) for x in first], ratio=[round(x, 5) for x in ratios])))
