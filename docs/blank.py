"""Fill-in exercises: a copy of this project in which some functions have no body. Its tests are the grader.

    python docs/blank.py gae whiten             # makes out/exercise, without the bodies of these two
    cd out/exercise && python test_all.py gae whiten                # red, until you have written them
    python docs/blank.py --solution gae         # gives one back, whatever stands there by now

A function keeps its name, its arguments and its docstring. A copy that is there already is worked on, not
replaced: nothing that you wrote is lost, but for what you name after --solution.
"""
import ast
import shutil
import sys
from pathlib import Path

ROOT, COPY = Path(__file__).parent.parent, Path("out/exercise")
FILES = "sft.py", "reward.py", "ppo.py", "model.py", "memory.py"
EMPTY = 'raise NotImplementedError("yours to write")'


def find(folder, name):
    """-> (path, its lines, the function's first line, its body's first, its last; from 0), body without
    docstring."""
    for path in (folder / file for file in FILES):
        text = path.read_text(encoding="utf-8")
        try:
            functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        except SyntaxError as error:
            raise SystemExit(f"{path}, line {error.lineno}: not Python yet ({error.msg}).") from None
        for node in functions:
            if node.name == name:
                body = node.body[ast.get_docstring(node) is not None:]
                return path, text.splitlines(True), node.lineno - 1, body[0].lineno - 1, node.end_lineno
    raise SystemExit(f"{name}: no function of {', '.join(FILES)}.")


def main(names, solution):
    if not names:
        raise SystemExit(__doc__)
    originals = {name: find(ROOT, name) for name in names}  # a typo stops it before anything is written
    if not COPY.exists():
        leave_out = shutil.ignore_patterns("out", ".git", "__pycache__", "*.pyc")
        shutil.copytree(ROOT, COPY, ignore=leave_out)
    for name in names:
        path, lines, start, body, end = find(COPY, name)
        if solution:
            _, whole, first, _, last = originals[name]
            lines[start:end] = whole[first:last]
        else:
            indent = lines[body][:len(lines[body]) - len(lines[body].lstrip())]
            lines[body:end] = [f"{indent}{EMPTY}\n"]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {name} {'given back' if solution else 'is yours to write'}")


if __name__ == "__main__":
    main([arg for arg in sys.argv[1:] if arg != "--solution"], "--solution" in sys.argv)
