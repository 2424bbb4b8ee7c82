"""
Grade what students hand in; for the teacher, in a git checkout of the finished code.

    python -m tests.course.grade DIR ..                 # a line a student; of one DIR, all messages
    python -m tests.course.grade DIR .. --tests FOLDER  # with tests of your own (README.md here)
    python -m tests.course.grade DIR .. --csv marks.csv --json results.json     # Gradescope's

One exercise at a time goes from DIR into the finished code, whose tests decide; every test of an
exercise is worth the same part of its points. The finished code and all tests are read into memory
first, and graded first. Each run is a process of its own in a fresh folder, without the exercise's
finished function. It ends after SECONDS of its own CPU time, however busy the machine is. The files
of results are written by this process, not by the student's.

Foreign code may do all that you may. Use a container without a network, in which the checkout and
the submissions are read-only. A student's code could still forge what its own process reports: read
the lines that are flagged.
"""
import argparse
import ast
import csv
import gc
import importlib
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from tests.course.exercises import (EXERCISES, FILES, Exercise, Recorder, answer, emptied, key_of,
                                    put_into, run_tests)
from tests.course.handout import COURSE, ROOT, CourseError, last_commit, run_script, write

POINTS = 10             # an exercise
SECONDS = 10            # of CPU time a run, which takes less than one
PATIENCE = 10           # times as long by the clock
MEMORY = 16 * 10 ** 9   # bytes of addresses
WRITTEN = 10 ** 7       # bytes a file
PRIVATE = f"{COURSE}/private/"
KIT = [f"{COURSE}/{name}" for name in ("__init__.py", "conftest.py", "test_exercises.py")]
NEEDED = (*FILES, "tests/__init__.py", *KIT, PRIVATE, "tests/toy/")         # of the finished code
SUSPICIOUS = set("""open exec eval compile globals vars getattr setattr sys os io gc inspect pytest
tests importlib runpy builtins ctypes subprocess signal socket pathlib Path pickle load hub
cpp_extension threading multiprocessing urllib traceback atexit random_split from_file fromfile""".split())


class Mark(NamedTuple):
    exercise: Exercise
    messages: dict              # {test: why it failed, or ""}
    look_at: list               # "value.py:31 open": what is seldom in an honest answer

    @property
    def points(self):
        return POINTS * list(self.messages.values()).count("") / len(self.messages)

    @property
    def remark(self):
        """Why the first test failed that did, or "" """
        failed = [f"{test.split('::')[-1]}: {text}" for test, text in self.messages.items() if text]
        return failed[0] if failed else ""


# --------------------------------------------------------------------------- a process of its own

def run_apart(work, folder, seconds):
    """
    Call work(tell) in a process of its own, in `folder` -> [what it told, ..], and how it ended, ""
    if well. Each line begins with a secret: what is written blindly to all files does not count.
    """
    secret = secrets.token_hex(16)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as lines:
        child = os.fork()
        if child == 0:
            try:
                set_limits(folder, seconds, lines.fileno())
                work(lambda *told: print(secret + json.dumps(told), file=lines, flush=True))
                os._exit(0)
            finally:                                            # after any error: no way back
                os._exit(1)
        status = wait(child, PATIENCE * seconds)
        lines.seek(0)
        told = [json.loads(line[len(secret):]) for line in lines if line.startswith(secret)]
    if status in (None, -signal.SIGXCPU, -signal.SIGKILL):
        return told, f"it took more than {seconds} seconds of CPU time, or too much memory"
    if status:
        return told, f"it left Python (status {status})"
    return told, ""


def set_limits(folder, seconds, kept):
    """Of all open files one is kept"""
    os.setsid()
    os.closerange(3, kept)
    os.closerange(kept + 1, 1024)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.chdir(folder)
    torch.set_num_threads(1)
    import resource                                             # Windows has none, nor a fork
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))


def wait(child, seconds):
    """-> the exit status of the process, a signal below 0; None: it had to be ended"""
    end = time.monotonic() + seconds
    status = None
    while status is None and time.monotonic() < end:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(code)
        time.sleep(0.002)
    try:
        os.killpg(child, signal.SIGKILL)                        # with all that it started
    except ProcessLookupError:
        pass
    if status is None:
        os.waitpid(child, 0)
    return status


# ------------------------------------------------------------------------------------------ grading

def run_files(files, exercises, parts=None):
    """
    The exercises' tests on {name: bytes}, with an `answer` to the first put in
    -> {test: why it failed, or ""}, [what else went wrong, ..]
    """
    def work(tell):
        forget_modules()
        if parts:
            file = exercises[0].file
            try:
                put_into(importlib.import_module(Path(file).stem), parts, exercises[0])
            except Exception as error:              # what a foreign file imports may raise anything
                return tell("", f"{file}: {type(error).__name__}: {error}"[:200])
        recorder = Recorder([exercise.key for exercise in exercises], tell)
        run_tests(recorder, COURSE)
        for stranger in recorder.strangers:
            tell("", f"{stranger} names no exercise; call it test_KEY_.., KEY a key of EXERCISES")
        for broken in recorder.broken:
            tell("", broken)

    with tempfile.TemporaryDirectory() as folder:
        write({name: data for name, data in files.items() if name.startswith(NEEDED)}, folder)
        told, end = run_apart(work, folder, SECONDS)
    results = {test: message for test, message in told if test}
    return results, [message for test, message in told if not test] + [end] * bool(end)


def forget_modules():
    """Import from the folder of the run, not from the checkout"""
    sys.path[:] = [os.getcwd()] + [path for path in sys.path if Path(path).resolve() != ROOT]
    ours = {"tests", *(Path(file).stem for file in FILES)}
    for name in list(sys.modules):
        if name.split(".")[0] in ours:
            del sys.modules[name]


def flagged(parts, file):
    """An `answer` -> ["value.py:31 open", ..]: suspicious names, for the teacher to look at"""
    found = []
    for node in [node for part in parts for statement in part for node in ast.walk(statement)]:
        names = []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or ""] + [alias.name for alias in node.names]
        elif isinstance(node, (ast.Name, ast.Attribute)):
            names = [getattr(node, "id", None) or getattr(node, "attr", None)]
        for name in names:
            if SUSPICIOUS & set(name.split(".")) or name.startswith("__"):
                found.append(f"{file}:{node.lineno} {name}")
    return list(dict.fromkeys(found))


def grade_exercise(files, tests, folder, exercise):
    """{name: bytes} of the finished code, {test: ""} of all tests, a student's folder -> a Mark"""
    file = exercise.file
    mine = [test for test in tests if key_of(test.split("::")[-1]) == exercise.key]
    try:
        parts = answer(Path(folder, file).read_bytes(), files[file], exercise)
    except (OSError, SyntaxError, LookupError, ValueError, RecursionError) as error:
        reason = f"{file}: {error or type(error).__name__}".replace("<unknown>, ", "")
        return Mark(exercise, dict.fromkeys(mine, reason), [])
    without = files | {file: emptied(files[file].decode(), exercise).encode()}
    results, notes = run_files(without, [exercise], parts)
    reason = "; ".join(notes) or "not run"
    messages = {test: results.get(test, reason) for test in mine}
    return Mark(exercise, messages, flagged(parts, file))


def private_tests(folder):
    """All of a folder with test_*.py, helpers too -> {name: bytes}"""
    files = {PRIVATE + path.relative_to(folder).as_posix(): path.read_bytes()
             for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".pyc"}
    if not any(Path(name).match("test_*.py") for name in files):
        raise CourseError(f"--tests {folder}: no test_*.py there")
    return files


def grade_finished(files):
    """-> {test: ""}. The finished code must pass, or nothing can be graded."""
    tests, notes = run_files(files, EXERCISES)
    wrong = notes + [f"{test}: {message}" for test, message in tests.items() if message]
    if wrong:
        raise CourseError(f"the finished code does not pass, so nothing is graded: {wrong[0]}")
    own = sum(test.startswith("private/") for test in tests)
    print(f"the finished code passes: {len(EXERCISES)} exercises, {len(tests)} tests, "
          f"{own} of them from --tests", flush=True)
    return tests


# ------------------------------------------------------------------------------------------ results

def total(marks):
    return round(sum(mark.points for mark in marks), 2)


def show(name, marks, details):
    look_at = [line for mark in marks for line in mark.look_at]
    points = "  ".join(f"{mark.exercise.number}: {mark.points:.3g}" for mark in marks)
    line = f"{name:20} {total(marks):5.4g} of {POINTS * len(marks)}   {points}"
    if look_at:
        line += f"   look at {len(look_at)} lines"
    print(line, flush=True)
    if details:
        for mark in marks:
            number, *_, key = mark.exercise
            print(f"  {number} {key:11} {mark.points:4.3g}  {mark.remark}")
        for line in look_at:
            print(f"  look at {line}")


def gradescope(marks):
    """What Gradescope reads as results.json; its students do not see private tests"""
    tests = []
    for mark in marks:
        for test, message in mark.messages.items():
            points = POINTS / len(mark.messages)
            tests.append({"name": test, "score": 0 if message else points, "max_score": points,
                          "output": message or "passed",
                          "visibility": "hidden" if test.startswith("private/") else "visible"})
    look_at = [line for mark in marks for line in mark.look_at]
    return {"score": total(marks), "tests": tests, "extra_data": {"look_at": look_at}}


def write_csv(path, results):
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        keys = [exercise.key for exercise in EXERCISES]
        rows.writerow(["name", "total", *keys, "look at", "remarks"])
        for name, marks in results.items():
            look_at = " ".join(line for mark in marks for line in mark.look_at)
            remarks = " | ".join(mark.remark for mark in marks if mark.remark)
            points = [round(mark.points, 2) for mark in marks]
            rows.writerow([name, total(marks), *points, look_at, remarks])


def main(argv, root=ROOT):
    parser = argparse.ArgumentParser(prog="grade", description=__doc__.split("\n")[1])
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument("--tests", help="a folder with more tests, called test_KEY_..")
    parser.add_argument("--csv", help="a table: a row a student")
    parser.add_argument("--json", help="Gradescope's results.json; of several DIRs {DIR: it, ..}")
    args = parser.parse_args(argv)
    if not hasattr(os, "fork"):
        raise CourseError("grading needs Linux or macOS: use a container, or WSL")
    files = last_commit(root)
    if args.tests:
        files |= private_tests(args.tests)
    for folder in args.folders:
        if not any(Path(folder, file).is_file() for file in FILES):
            raise CourseError(f"{folder}: none of {', '.join(FILES)} is there; name a student's "
                              f"folder")
    gc.freeze()             # so that collecting garbage does not copy all of torch in each process
    tests = grade_finished(files)
    results = {}
    for folder in args.folders:
        marks = [grade_exercise(files, tests, folder, exercise) for exercise in EXERCISES]
        results[folder] = marks
        show(folder, marks, details=len(args.folders) == 1)
    if args.csv:
        write_csv(args.csv, results)
    if args.json:
        found = {folder: gradescope(marks) for folder, marks in results.items()}
        only = found if len(found) > 1 else found[args.folders[0]]
        Path(args.json).write_text(json.dumps(only, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
