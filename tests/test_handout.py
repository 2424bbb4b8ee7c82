"""The course kit: every exercise's tests fail on an empty body and on wrong answers, pass on the right one."""
import ast
import importlib
import subprocess
import sys

import pytest
import test_exercises
from handout import EXERCISES, ROOT, find, put

WRONG = {       # {function: [(what, in the finished body as ast.unparse writes it), instead; ..]}
    "Cache.store": [("self.positions] = k", "self.positions] = v"), ("self.positions", "slice(k.size(2))"),
                    ("self.keys[layer][", "self.keys[0]["), (":self.window", ":self.used")],
    "bellman_targets": [
        ("(1 - lam) * next_value + lam * next_target", "lam * next_value + (1 - lam) * next_target"),
        ("* next_value", "* values[:, t]"),                                            # own state, not the next
        ("values[:, t] * mask[:, t], target", "values[:, t], target"), ("rewards[:, t]", "rewards[:, t - 1]")],
    "ascend": [("hidden + u", "hidden"), ("u / value.std", "u"), ("step_size *", "abs(step_size) *"),
               (".clamp(max=1)", ""), (" * math.sqrt(u.size(-1))", "")],
    "kl_ball": [("kl_divergence(log_q, log_p)", "kl_divergence(log_p, log_q)"), ("return low", "return 0 * low"),
                ("return low", "return low ** 0"), ("0.99 * max_kl", "0.5 * max_kl")],
    "draw": [("return ", "return 0 * "), ("uniform.double()", "(1 - uniform.double())"), ("cdf - sums", "cdf"),
             ("* block + ", "* 256 + "), ("rest, right=True", "rest")],
    "whitening": [("- W.double().mean(0)", ""), (" / len(scores)", ""), (".sqrt()", ""), (".double()", ""),
                  (" / sizes.clamp", " * sizes.clamp"), ("sizes.clamp(min=1e-10 * sizes.max())", "sizes"),
                  (" @ axes.T", "")]}


def failures(monkeypatch, file, function, tests, source):
    """The messages of the exercise's failed tests, with the source in place of the file's function."""
    module = importlib.import_module(file[:-3])
    exec(compile(source, file, "exec"), space := vars(module) | {"__name__": module.__name__})
    *owner, name = function.split(".")
    changed, owner = (space[owner[0]], getattr(module, owner[0])) if owner else (None, module)
    monkeypatch.setattr(owner, name, vars(changed)[name] if changed else space[name])
    chosen = [test for key, test in vars(test_exercises).items() if key.startswith("test_") and tests in key]
    found = []
    for test in chosen:
        try:
            test()
        except (Exception, pytest.fail.Exception) as error:
            found.append(f"{type(error).__name__} {error}")
    assert chosen
    return found


@pytest.mark.parametrize("number, file, function, tests, minutes, difficulty", EXERCISES)
def test_exercise(monkeypatch, number, file, function, tests, minutes, difficulty):
    def failed(body):
        return failures(monkeypatch, file, function, tests, put(source, function, body))
    source = (ROOT / file).read_text("utf-8")
    body = "\n".join(map(ast.unparse, find(source, function)[1]))
    assert failed(body) == []
    assert failed("pass")
    for old, new in WRONG[function]:
        assert old in body
        assert failed(body.replace(old, new)), f"{function} with {new} for {old} passes"


def test_readme_has_the_table():
    lines = (ROOT / "README.md").read_text("utf-8").split("\n")
    for number, file, function, tests, *rest in EXERCISES:
        rows = [line.split("|") for line in lines if f"`{file}: {function}`" in line and f"`{tests}`" in line]
        assert [[int(cell) for cell in row if cell.strip().isdigit()] for row in rows] == [[number, *rest]]


def test_from_both_ends(tmp_path):
    """A handout without answers; one right, one empty, one that no longer parses, one removed."""
    def handout(*arguments):
        return subprocess.run([sys.executable, ROOT / "tests" / "handout.py", *arguments],
                              capture_output=True, text=True)
    folder = tmp_path / "hw"
    handout(folder)
    assert not (folder / ".git").exists()
    assert "log_q" not in (folder / "control.py").read_text("utf-8").split("def kl_ball")[1].split("def draw")[0]
    assert 'exercise 2: pytest tests/test_exercises.py -k targets' in (folder / "value.py").read_text("utf-8")
    (folder / "value.py").write_bytes((ROOT / "value.py").read_bytes())
    (folder / "control.py").write_text("def ascend(:\n")
    (folder / "train_value.py").unlink()
    (folder / "tests" / "test_exercises.py").write_text("def test_store(): pass\n")
    result = handout("--check", folder)
    for line in ("1 Cache.store      FAILED", "2 bellman_targets  passed", "3 ascend           control.py: Syntax",
                 "6 whitening        train_value.py: FileNot", "1 of 6 passed", "container"):
        assert line in result.stdout
    assert result.returncode == 1
