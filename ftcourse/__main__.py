"""python -m ftcourse: in a checkout the tasks of tools/tasks.py (setup, test, docs ...), everywhere the command line."""
import importlib.util, os, sys
from pathlib import Path


def _tasks(root):
    "The checkout's task module, or None in an installed package and inside a task."
    file = root / "tools" / "tasks.py"
    if "FTCOURSE_TASK" in os.environ or not file.is_file() or not (root / "settings.ini").is_file(): return None
    spec = importlib.util.spec_from_file_location("ftcourse_tasks", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv):
    tasks = _tasks(Path(__file__).resolve().parent.parent) if argv else None
    if tasks and argv[0] in tasks.TASKS:
        os.environ["FTCOURSE_TASK"] = argv[0]
        return tasks.main(argv)
    from ftcourse.cli import main
    main()


if __name__ == "__main__": main(sys.argv[1:])
