"""
The course kit: its tests tell right answers from wrong ones; handing out, checking and grading work
from both ends. In a small checkout of its own, since grading refuses one with changes.
"""
import ast
import contextlib
import importlib
import io
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.course import check, grade, handout, leaderboard, test_exercises
from tests.course.answers import RIGHT, WRONG
from tests.course.exercises import (EXERCISES, FILES, answer, explain, find, key_of, parsed,
                                    put_into, with_body)

ROOT = handout.ROOT
SOURCES = {file: (ROOT / file).read_text("utf-8") for file in FILES}
KEYS = [exercise.key for exercise in EXERCISES]
COURSE = [f"tests/course/{path.name}" for path in (ROOT / "tests/course").glob("*.*")]
TARGETS, _, LOSS, FORWARD, ASCEND, *_ = EXERCISES


# --------------------------------------------------------------------------- the tests of exercises

def first_failure(exercise, source):
    """The message of the exercise's first test that fails with this file (bytes), or None"""
    module = importlib.import_module(Path(exercise.file).stem)
    *owner, name = exercise.function.split(".")
    owner = getattr(module, owner[0]) if owner else module
    before = dict(vars(module)), vars(owner)[name]
    put_into(module, answer(source, SOURCES[exercise.file].encode(), exercise), exercise)
    try:
        for test, function in list(vars(test_exercises).items()):
            if key_of(test) == exercise.key:
                function()
    except Exception as error:
        return explain(error)
    finally:
        for key in vars(module).keys() - before[0].keys():
            delattr(module, key)
        setattr(owner, name, before[1])


def first_failure_of(exercise, body):
    source = with_body(SOURCES[exercise.file], exercise.function, body.strip("\n"))
    return first_failure(exercise, source.encode())


@pytest.mark.parametrize("exercise", EXERCISES, ids=KEYS)
def test_right_answers_pass_and_wrong_ones_fail(exercise):
    right = RIGHT[exercise.key].strip("\n").split("\n\n")
    wrong = WRONG[exercise.key].strip("\n").split("\n")
    assert len(right) >= 5 and len(set(wrong)) >= 20
    for body in right:
        assert first_failure_of(exercise, body) is None, body
    for line in wrong:
        old, _, new = line.partition(" =>")
        assert old in right[0], f"{line}: not in the first right answer"
        message = first_failure_of(exercise, right[0].replace(old, new.removeprefix(" ")))
        assert message, f"{line}: passes"
        assert "expected" in message or "Error" in message, f"{line}: {message}"


def in_form(name):
    """A right answer as a student may write it -> exercise, file"""
    source = SOURCES["control.py"]
    if name == "parameter":
        start, end = source.index("def ascend"), source.index("def kl_divergence")
        body = source[start:end].replace("steps", "n_steps").replace("hidden", "h_t")
        return ASCEND, (source[:start] + body + source[end:]).encode()
    if name == "default":
        return ASCEND, source.replace("radius=RADIUS)", "radius=MINE)", 1).replace(
            "def ascend", "MINE = 3.0\n\n\ndef ascend").encode()
    source = SOURCES["value.py"]
    if name == "helper":
        body = "return backwards(values, rewards, mask, lam)"
        helper = "\n\ndef backwards(values, rewards, mask, lam):\n" + "".join(
            f"    {line}\n" for line in RIGHT["targets"].strip("\n").split("\n\n")[0].split("\n"))
        return TARGETS, (with_body(source, "bellman_targets", body) + helper).encode()
    if name == "import":
        body = RIGHT["targets"].strip("\n").split("\n\n")[0].replace("torch.zeros_like", "zeros")
        source = "from torch import zeros_like as zeros\n" + source
        return TARGETS, with_body(source, "bellman_targets", body).encode()
    if name == "byte order mark":
        return TARGETS, source.encode("utf-8-sig")
    if name == "latin-1":
        latin = source.encode("ascii", "ignore").decode()
        return TARGETS, ("# coding: latin-1\n# d\xe9j\xe0\n" + latin).encode("latin-1")
    if name == "Windows":
        return TARGETS, source.replace("\n", "\r\n").encode()
    if name == "method":
        body = "return self.read(hidden, so_far)"
        source = with_body(source, "ValueNet.forward", body)
        lines = RIGHT["forward"].strip("\n").split("\n\n")[0].split("\n")
        extra = "    def read(self, hidden, so_far):\n" + "".join(f"        {s}\n" for s in lines)
        source = source.replace("    def forward", extra + "\n    def forward", 1)
        return FORWARD, source.encode()


@pytest.mark.parametrize("name", ["helper", "import", "parameter", "default", "byte order mark",
                                  "latin-1", "Windows", "method"])
def test_right_answers_in_any_form_pass(name):
    exercise, source = in_form(name)
    assert first_failure(exercise, source) is None


# ------------------------------------------------------------------------------------ the whole kit

def git(folder, *arguments):
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def write_checkout(folder):
    """A checkout with what grading needs; its tests of exercises are the real ones"""
    for name in [*FILES, "tests/__init__.py", *COURSE]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "finished")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    write_checkout(folder)
    return folder


def student(folder, **changes):
    """A student's folder: the finished files, but for {file stem: text}"""
    folder.mkdir()
    for file in FILES:
        text = changes.get(Path(file).stem, SOURCES[file])
        (folder / file).write_text(text, "utf-8")
    return str(folder)


def graded(checkout, *arguments, exercises=EXERCISES[:1]):
    """What grading prints; of a few exercises, to save time"""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(grade, "EXERCISES", exercises)
        grade.main(list(arguments), checkout)
    return output.getvalue()


def test_a_handout_has_no_answers_and_says_what_is_left(checkout, tmp_path):
    handout.main([str(tmp_path / "hw")], checkout)
    texts = {path.relative_to(tmp_path / "hw").as_posix(): path.read_text("utf-8")
             for path in (tmp_path / "hw").rglob("*.*") if path.is_file()}
    assert "do not" in texts["AGENTS.md"].lower() and "tests/course/answers.py" not in texts
    for exercise in EXERCISES:
        node = find(parsed(SOURCES[exercise.file]), exercise.function)[1]
        empty = find(parsed(texts[exercise.file]), exercise.function)[1]
        assert ast.dump(node) != ast.dump(empty)
        assert len(empty.body) == 2 and "exercise" in ast.unparse(empty.body[1])

    def work(tell):
        grade.forget_modules()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            check.main()
        tell(output.getvalue())
    (told,), end = grade.run_apart(work, tmp_path / "hw", 60)
    lines = told[0].splitlines()
    assert not end and len(lines) == 5
    assert "1 targets: to do   4 forward: to do" in lines[0]
    assert lines[4].startswith("0 of ") and lines[4].endswith("-k targets")


def test_marks(checkout, tmp_path):
    """Part credit, one line a student, csv and json; twice the same"""
    good = student(tmp_path / "good")
    half = student(tmp_path / "half", train_value="import nothing_there\n",
                   control="def ascend(:\n",
                   value=SOURCES["value.py"].replace("lam * next_target", "lam ** 2 * next_target"))
    files = ["--csv", str(tmp_path / "marks.csv"), "--json", str(tmp_path / "marks.json")]
    few = EXERCISES[:4]
    output = graded(checkout, good, half, *files, exercises=few)
    assert "40 of 40" in output and "1: 7.5  2: 0  3: 0  4: 10" in output
    rows = (tmp_path / "marks.csv").read_text().splitlines()
    assert rows[1].startswith(f"{good},40.0,10.0") and "control.py: invalid syntax" in rows[2]
    marks = json.loads((tmp_path / "marks.json").read_text())
    assert marks[half]["score"] == 17.5 and marks[good]["score"] == 40
    details = graded(checkout, half, exercises=few)
    assert "17.5 of 40   1: 7.5  2: 0  3: 0  4: 10" in details and "no bellman_loss" in details


CHEATS = {
    "os._exit": """import os
for i in range(3, 50):
    try:
        os.write(i, b'["", ""]\\n' * 9)
    except OSError:
        pass
os._exit(0)""",
    "pytest.exit": "import pytest\npytest.exit('4 passed', 0)",
    "the finished file": """import runpy
return runpy.run_path('value.py')['bellman_targets'](values, rewards, mask, lam)""",
    "open": "open('tests/course/test_exercises.py', 'w').write('')\nreturn values",
    "no end": "while True: pass",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail_and_are_flagged(checkout, tmp_path, monkeypatch, name):
    monkeypatch.setattr(grade, "SECONDS", 2)
    source = with_body(SOURCES["value.py"], "bellman_targets", CHEATS[name])
    files = handout.last_commit(checkout)
    tests = dict.fromkeys(f"test_exercises.py::{test}" for test in vars(test_exercises)
                          if key_of(test) == "targets")
    mark = grade.grade_exercise(files, tests, student(tmp_path / "a", value=source), TARGETS)
    assert mark.points == 0
    if name == "no end":
        assert "seconds of CPU time" in mark.remark
    else:
        assert mark.look_at and mark.look_at[0].startswith("value.py:")


def test_an_error_is_shown_with_its_line(checkout, tmp_path):
    source = SOURCES["value.py"].replace("targets = torch.zeros_like(values)", "targets = nothing")
    line = source.split("\n").index("    targets = nothing") + 1
    folder = student(tmp_path / "a", value=source)
    assert f"value.py, line {line}: NameError" in graded(checkout, folder)


def test_private_tests(checkout, tmp_path):
    """With a helper beside them; one that names no exercise, and an empty folder, are refused"""
    mine, one = tmp_path / "mine", student(tmp_path / "one")
    mine.mkdir()
    with pytest.raises(handout.CourseError, match="no test_"):
        graded(checkout, one, "--tests", str(mine))
    (mine / "helper.py").write_text("LAM = 0.5\n")
    (mine / "test_mine.py").write_text("from helper import LAM\n"
                                       "def test_targets_more(): assert LAM == 0.5\n")
    assert "1 of them from --tests" in graded(checkout, one, "--tests", str(mine))
    (mine / "test_other.py").write_text("def test_other(): pass\n")
    with pytest.raises(handout.CourseError, match="test_other names no exercise"):
        graded(checkout, one, "--tests", str(mine))


def test_what_stops_the_grading(checkout, tmp_path, monkeypatch):
    one = student(tmp_path / "one")
    (tmp_path / "zip").mkdir()
    with pytest.raises(handout.CourseError, match="no git checkout"):
        graded(tmp_path / "zip", one)
    with pytest.raises(handout.CourseError, match="none of value.py"):
        graded(checkout, one, str(tmp_path / "zip"))
    (checkout / "value.py").write_text("changed")
    with pytest.raises(handout.CourseError, match="value.py"):
        graded(checkout, one)
    git(checkout, "commit", "-qam", "broken")
    with pytest.raises(handout.CourseError, match="the finished code does not pass"):
        graded(checkout, one)
    git(checkout, "reset", "-q", "--hard", "HEAD~1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(handout.CourseError, match="git cannot be run"):
        graded(checkout, one)


def test_recipes_for_changed_questions(tmp_path):
    """README.md's, as they are written: the changed code passes, the old answer does not"""
    page = (ROOT / "tests/course/README.md").read_text("utf-8")
    blocks = re.findall("```python\n# (.+?)\n(.+?)```", page, re.S)
    recipes = list(zip(blocks[::2], blocks[1::2]))
    assert [test for _, (test, _) in recipes] == ["private/test_norm.py", "private/test_steps.py"]
    folder = tmp_path / "checkout"
    folder.mkdir()
    write_checkout(folder)
    (tmp_path / "private").mkdir()
    for (file, code), (test, checks) in recipes:
        name = re.search(r"def (\w+)", code)[1]
        path = folder / file
        start, _, rest = path.read_text().partition(f"def {name}(")
        following = re.split(r"\n\n(?=def |@|class |# -)", rest, maxsplit=1)[1]
        path.write_text(start + code + "\n" + following)
        (tmp_path / test).write_text(checks)
        tests = folder / "tests/course/test_exercises.py"
        key = next(exercise.key for exercise in EXERCISES if exercise.function == name)
        tests.write_text(re.sub(rf"def test_{key}_.+?\n\n\n", "", tests.read_text(), flags=re.S))
    git(folder, "commit", "-qam", "changed")
    changed = student(tmp_path / "changed", value=(folder / "value.py").read_text(),
                      control=(folder / "control.py").read_text())
    old = student(tmp_path / "old")
    output = graded(folder, changed, old, "--tests", str(tmp_path / "private"),
                    exercises=[TARGETS, LOSS, ASCEND])
    assert "30 of 30" in output and "1: 0  3: 10  5: 0" in output


def test_leaderboard(tmp_path, monkeypatch):
    """The share of a mark to beat; a controller that fails is shown with its line"""
    monkeypatch.setattr(leaderboard, "TEXTS", 400)
    languages = {"first": leaderboard.Language(*leaderboard.LANGUAGES["first"], seed=5, texts=400)}
    results, error = leaderboard.measure(languages, leaderboard.static)
    share, gain, kl = results["first"]
    assert not error and 0.3 < share < 1.1 and gain > 0 and 0.15 < kl < 0.45
    own = tmp_path / "controller.py"
    own.write_text("def make(model, tokenizer, prompts, n_tokens):\n    return nothing\n")
    assert leaderboard.measure(languages, own) == (
        {}, "first: controller.py, line 2: NameError: name 'nothing' is not defined")


def test_the_page_has_a_row_for_each_exercise():
    page = (ROOT / "tests/course/README.md").read_text("utf-8")
    for number, file, function, key in EXERCISES:
        row, = [line for line in page.split("\n") if line.startswith(f"| {number} |")]
        assert f"`{file}: {function}`" in row and f"`{key}`" in row
