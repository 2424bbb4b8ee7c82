"""
The exercises, and how a function is taken out of a student's file and put into the finished code.

What counts of a file: the exercise's function with its parameters and defaults, and what the file
adds to the finished one: new functions, methods, classes, constants, imports. Changes to anything
else do not count, so that one mistake costs one exercise.
"""
import ast
import functools
import os
import random
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch


class Exercise(NamedTuple):
    number: int
    file: str
    function: str
    key: str            # its tests are called test_KEY_..


EXERCISES = [
    Exercise(1, "value.py", "bellman_targets", "targets"),
    Exercise(2, "control.py", "grad_log_p", "grad_log_p"),
    Exercise(3, "train_value.py", "bellman_loss", "loss"),
    Exercise(4, "value.py", "ValueNet.forward", "forward"),
    Exercise(5, "control.py", "ascend", "ascend"),
    Exercise(6, "control.py", "kl_ball", "kl_ball"),
    Exercise(7, "control.py", "draw", "draw"),
    Exercise(8, "train_value.py", "whitening", "whitening"),
    Exercise(9, "model.py", "Cache.store", "store"),
]
FILES = list(dict.fromkeys(exercise.file for exercise in EXERCISES))
TODO = "exercise {0.number}, {0.function} in {0.file}: python -m pytest tests/course -k {0.key}"
STUB = """# Your solution. What you add to this file counts, too: functions, constants, imports.
raise NotImplementedError("{}")"""
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


# ------------------------------------------------------------------------------ functions in files

@functools.cache
def parsed(source):
    return ast.parse(source)


def find(tree, function):
    """A syntax tree, "name" or "Class.name" -> the body it stands in, and its node"""
    body = tree.body
    for name in function.split("."):
        found = [node for node in body if isinstance(node, DEFINITIONS) and node.name == name]
        if not found:
            raise LookupError(f"no {function}")
        owner, body = body, found[-1].body          # of two definitions Python keeps the last
    return owner, found[-1]


def with_body(source, function, body):
    """The source (str) with other lines below the function's docstring"""
    _, node = find(parsed(source), function)
    lines = source.split("\n")
    indent = " " * (node.col_offset + 4)
    inside = [indent + line for line in body.split("\n")]
    return "\n".join(lines[:node.body[0].end_lineno] + inside + lines[node.end_lineno:])


def emptied(source, exercise):
    """The source with the exercise's function to be filled in"""
    return with_body(source, exercise.function, STUB.format(TODO.format(exercise)))


def names_of(statement):
    """The names that a statement defines; none for a statement of another kind"""
    if isinstance(statement, DEFINITIONS):
        return [statement.name]
    targets = getattr(statement, "targets", [])
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    nodes = [node for target in targets for node in ast.walk(target)]
    return [node.id for node in nodes if isinstance(node, ast.Name)]


def added(body, finished):
    """Statements of `body` that define what `finished`, a body as well, does not"""
    known = {name for statement in finished for name in names_of(statement)}
    imports = {ast.dump(statement) for statement in finished}
    new = []
    for statement in body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            if ast.dump(statement) not in imports:
                new.append(statement)
        elif names_of(statement) and not known & set(names_of(statement)):
            new.append(statement)
    return new


def answer(source, finished, exercise):
    """
    A student's file and the finished one, bytes -> what counts, two lists of statements: what the
    file adds, and the function (of a method: with what its class adds)
    """
    theirs, ours = parsed(source), parsed(finished)
    owner, function = find(theirs, exercise.function)
    around = added(theirs.body, ours.body)
    if owner is theirs.body:
        return around, [function]
    return around, added(owner, find(ours, exercise.function)[0]) + [function]


def put_into(module, parts, exercise):
    """Define an `answer` in the finished module. Its lines keep their numbers, for messages."""
    around, inside = (compile(ast.Module(part, []), exercise.file, "exec") for part in parts)
    target = module
    if "." in exercise.function:
        target = getattr(module, exercise.function.split(".")[0])
    exec(around, vars(module))
    new = {}
    exec(inside, vars(module), new)
    for name, item in new.items():
        setattr(target, name, item)


# ------------------------------------------------------------------------------- what pytest found

def key_of(name):
    """A test's name -> the key of its exercise, or None"""
    for exercise in EXERCISES:
        if f"{name}_".startswith(f"test_{exercise.key}_"):
            return exercise.key


def explain(error):
    """A test's exception -> a line; of an answer's own error with the line where it happened"""
    text = " ".join(traceback.format_exception_only(error)[-1].split())[:200]
    if isinstance(error, pytest.skip.Exception):
        return f"to do: {error.msg}"
    if isinstance(error, AssertionError):
        return text.removeprefix("AssertionError: ")
    frames = traceback.extract_tb(error.__traceback__)
    place = [frame for frame in frames if frame.filename in FILES]          # an answer, graded
    theirs = [*FILES, "controller.py"]
    place = place or [frame for frame in frames if Path(frame.filename).name in theirs]
    if place:
        text = f"{Path(place[-1].filename).name}, line {place[-1].lineno}: {text}"
    return text


class Recorder:
    """A pytest plugin: runs the tests of the exercises `keys`, and notes what became of each."""

    def __init__(self, keys, tell=lambda test, message: None):
        self.keys = keys
        self.tell = tell
        self.messages = {}          # {test: why it failed, "" if it passed}
        self.strangers = []         # tests that name no exercise
        self.broken = []            # files that pytest cannot read

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken.append(f"{report.nodeid}: {str(report.longrepr).splitlines()[-1]}")

    def pytest_collection_modifyitems(self, items):
        self.strangers = [item.nodeid for item in items if not key_of(item.name)]
        items[:] = [item for item in items if key_of(item.name) in self.keys]

    def pytest_runtest_setup(self, item):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        test = item.nodeid.removeprefix("tests/course/")
        if call.excinfo:
            self.messages[test] = explain(call.excinfo.value)
        elif call.when == "call":
            self.messages[test] = ""
        if call.when == "teardown":
            self.tell(test, self.messages[test])
        return (yield)


def run_tests(recorder, *paths):
    """pytest, without what costs time here: grading runs it once for each exercise and student"""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    unused = """cacheprovider unraisableexception threadexception doctest unittest junitxml pastebin
        stepwise faulthandler logging debugging setuponly setupplan warnings legacypath""".split()
    off = [option for name in unused for option in ("-p", f"no:{name}")]
    course = ["--rootdir=.", "--confcutdir=tests/course", "--assert=plain"]
    return pytest.main(["-q", "-s", *off, *course, *paths], [recorder])
