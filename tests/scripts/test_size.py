"""The count of lines of code leaves out what is not code."""

from scripts.size import by_folder, by_function, code_lines

SOURCE = '''"""A module.

It has a long docstring."""

# A comment.
import os  # Code with a comment.


def f(x: str = """
no docstring
""") -> None:
    """One of a function."""
    x = """text
    of two lines"""
    return os.path.join(
        x,

        "y")
'''


def test_lines_of_code_only() -> None:
    # The import, three lines of signature, two of the text, three of the return.
    assert code_lines(SOURCE) == 9
    assert code_lines("") == code_lines("# nothing\n\n") == 0
    assert by_folder([("a/b.py", SOURCE), ("a/c/d.py", "x = 1\n"), ("e.py", "x = 1\n")]) == {"a": 10, ".": 1}


def test_lines_by_function() -> None:
    klass = ("class A(B):\n    x = 1\n\n    @cached\n    def f(self):\n        def inner():\n            return 1\n"
             "        return inner\n")
    found = by_function([("a/b.py", SOURCE), ("a/c.py", klass), ("tests/t.py", klass), ("lab/l.py", klass)])
    # The import stands in no function; a decorator and what is inside of a method belong to it.
    assert found == {("a", ""): 1, ("a", "f"): 8, ("a", "A"): 2, ("a", "A.f"): 5}
