"""How long `import ftcourse` and `ftcourse --help` take beyond an empty Python: medians of alternating runs."""
import json, statistics, subprocess, sys, time

COMMANDS = {"empty": ["-c", "pass"], "import": ["-c", "import ftcourse"], "help": ["-m", "ftcourse", "--help"]}


def seconds(args):
    started = time.perf_counter()
    subprocess.run([sys.executable, *args], check=True, capture_output=True)
    return time.perf_counter() - started


def main(rounds=9):
    for args in COMMANDS.values(): seconds(args)
    times = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, args in COMMANDS.items(): times[name].append(seconds(args))
    median = {name: statistics.median(t) for name, t in times.items()}
    return {f"{name}_extra_s": round(median[name] - median["empty"], 3) for name in ("import", "help")}


if __name__ == "__main__": print(json.dumps(main()))
