"""
For students: how far each exercise is, in five lines. In the copy that you were handed:

    python -m tests.course.check
"""
import contextlib
import io

from tests.course.exercises import EXERCISES, FILES, Recorder, key_of, run_tests


def state(exercise, messages):
    """An exercise and {test: message} -> "1 targets: done" and the like"""
    mine = [text for test, text in messages.items() if key_of(test.split("::")[1]) == exercise.key]
    passed = mine.count("")
    word = f"{passed} of {len(mine)} tests"
    if mine and passed == len(mine):
        word = "done"
    elif all(text.startswith("to do") for text in mine):
        word = "to do"
    return f"{exercise.number} {exercise.key}: {word}"


def main():
    recorder = Recorder([exercise.key for exercise in EXERCISES])
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run_tests(recorder, "tests/course/test_exercises.py")
    if not recorder.messages:
        print(output.getvalue())                    # a file that cannot be imported, and why
        return
    states = {exercise: state(exercise, recorder.messages) for exercise in EXERCISES}
    for file in FILES:
        print(f"{file:15}", "   ".join(states[e] for e in EXERCISES if e.file == file))
    left = [e for e in EXERCISES if not states[e].endswith("done")]
    passed = list(recorder.messages.values()).count("")
    line = f"{passed} of {len(recorder.messages)} tests pass"
    if left:
        line += f"; next: python -m pytest tests/course -k {left[0].key}"
    print(line)


if __name__ == "__main__":
    main()
