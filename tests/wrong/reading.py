"""Plausible wrong answers to the chapter's exercises: each must be refused."""
import json


def only_the_character(data):  # the position in the text that could be decoded, not in the bytes
    try: data.decode("utf-8")
    except UnicodeDecodeError as e: return len(data[:e.start].decode("utf-8"))


def not_ascii(data): return next((i for i, b in enumerate(data) if b > 127), None)


def end_of_error(data):
    try: data.decode("utf-8")
    except UnicodeDecodeError as e: return e.end


def after_loading(text):
    def walk(v): return [k for k in v for _ in range(list(v).count(k) - 1)] + [k for x in v.values() for k in walk(x)] if isinstance(v, dict) else []
    return sorted(walk(json.loads(text)))


def by_text(text): return sorted({k for k in "ab" if text.count(f'"{k}"') > 1})


def over_the_whole_text(text):
    seen = []
    json.loads(text, object_pairs_hook=lambda pairs: seen.extend(k for k, _ in pairs))
    return sorted({k for k in seen if seen.count(k) > 1})


def unsorted(text):
    out = []
    def look(pairs):
        keys = [k for k, _ in pairs]
        out.extend(k for k in dict.fromkeys(keys) if keys.count(k) > 1)
        return dict(pairs)
    json.loads(text, object_pairs_hook=look)
    return out


WRONG = {
    "reading.1": [only_the_character, not_ascii, end_of_error],
    "reading.2": [after_loading, by_text, over_the_whole_text, unsorted],
    "reading.3": [lambda data: data.count(b"\n"), lambda data: len([x for x in data.decode().splitlines() if x.strip()]), lambda data: len(data.split(b"\n"))],
}
