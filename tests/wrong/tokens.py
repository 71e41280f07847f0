"Plausible wrong answers to the exercises of the chapter on tokens."


def _len_of_encoding(tokenizer, messages): return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True))
def _with_prompt(tokenizer, messages): return len(tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"])
def _characters(tokenizer, messages): return sum(len(m["content"]) for m in messages)


def _one_level(ids, rules): return [j for i in ids for j in rules.get(i, (i,))]
def _two_levels(ids, rules): return _one_level(_one_level(ids, rules), rules)
def _bytes_dropped(ids, rules): return [j for i in ids for j in (_bytes_dropped(rules[i], rules) if i in rules else [])]


def _one_pass(text): return text.replace("<|im_start|>", "").replace("<|im_end|>", "")
def _two_passes_of_one(text): return text.replace("<|im_end|>", "").replace("<|im_end|>", "")
def _all_brackets(text): return text.replace("<", "").replace("|", "").replace(">", "")


WRONG = {
    "tokens.1": [_len_of_encoding, _with_prompt, _characters],
    "tokens.2": [_one_level, _two_levels, _bytes_dropped],
    "tokens.3": [_one_pass, _two_passes_of_one, _all_brackets],
}
