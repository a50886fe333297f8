"""Strict parameters of a lesson: what the cell tagged ``parameters`` declares, and what may be put in its place.

papermill injects unknown names and wrong types silently, and lets a name carry code. Here the tagged cell is parsed with `ast`, never
executed, and whatever is given instead of a default is held against it: by `course` before a kernel starts, by `Guard` inside one.
"""

import ast
import difflib
import io
import math
import tokenize
from dataclasses import dataclass

TYPES = {"str": str, "int": int, "float": float, "bool": bool}
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
KINDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "True or False"}


class ParameterError(ValueError):
    """A parameter that a lesson cannot accept: unknown, of the wrong type, or never read."""

    def _render_traceback_(self):  # IPython shows this instead of its own frames: the sentence is what helps
        return [f"ParameterError: {self}"]


@dataclass(frozen=True)
class Parameter:
    """One line of the cell tagged ``parameters``: name, type, whether None is allowed, default value, help text."""

    name: str
    type: str
    optional: bool
    default: object
    help: str

    def accept(self, value):
        """Return `value` if its type fits (an int also fits a float), else raise ParameterError."""
        value = value.item() if hasattr(value, "item") else value  # a NumPy scalar
        fits = type(value) is TYPES[self.type] or (self.type == "float" and type(value) is int)
        if value is None:
            fits = self.optional
        elif self.type == "float" and fits:
            value = float(value)
            fits = math.isfinite(value)
        if not fits:
            wanted = KINDS[self.type] + (" or None" if self.optional else "")
            raise ParameterError(f"parameter {self.name} must be {wanted} ({self.type}), but {value!r} was given.")
        return value

    def parse(self, text):
        """Turn the text of a command line into a value of this parameter's type, or raise ParameterError."""
        if self.optional and text.strip().lower() in ("none", "null"):
            return None
        if self.type == "bool":
            return self.accept(TRUTH.get(text.strip().lower(), text))
        try:
            value = TYPES[self.type](text)
        except ValueError:
            value = text
        return self.accept(value)


def declared_parameters(source):
    """Read the source of the cell tagged ``parameters``: lines of the form ``name: type = literal  # help``.

    Returns dict name → Parameter. Raises ParameterError for anything else in the cell. Taught in notebooks/00_start_here.ipynb.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"the parameters cell is not valid Python, line {error.lineno}: {error.msg}.") from None
    comments = {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    found = {}
    for node in statements:
        line = ast.unparse(node)
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            raise ParameterError(f"in the parameters cell, `{line}` should read `name: type = value  # what it does`.")
        kinds = [kind.strip() for kind in ast.unparse(node.annotation).split("|")]
        optional = "None" in kinds
        kinds = [kind for kind in kinds if kind != "None"]
        if len(kinds) != 1 or kinds[0] not in TYPES:
            raise ParameterError(f"in the parameters cell, the type in `{line}` should be one of {', '.join(TYPES)}.")
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ParameterError(
                f"in the parameters cell, the default in `{line}` should be a plain value, not an expression."
            ) from None
        parameter = Parameter(node.target.id, kinds[0], optional, default, _help(node, comments))
        parameter.accept(default)
        if parameter.name in found:
            raise ParameterError(f"in the parameters cell, {parameter.name} is declared twice.")
        found[parameter.name] = parameter
    return found


def _help(node, comments):
    return " ".join(comments[line] for line in range(node.lineno, node.end_lineno + 1) if line in comments)


def check_name(name, known):
    """Raise ParameterError unless `name` is an identifier and one of `known`; suggests the nearest name."""
    if not str(name).isidentifier():
        raise ParameterError(f"{name!r} is not a parameter name: a name has only letters, digits and underscores.")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ParameterError(f"no parameter is called {name}. {hint}There are: {', '.join(sorted(known)) or 'none'}.")


def check_injected(source, declared):
    """Hold a cell that papermill injected (``# Parameters``) against the declared parameters; raise ParameterError."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(
            f"the injected parameters are not valid Python ({error.msg}); is a name no identifier?"
        ) from None
    for node in statements:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ParameterError(f"only `name = value` may be injected, but the parameters hold `{ast.unparse(node)}`.")
        name = node.targets[0].id
        check_name(name, declared)
        try:
            value = ast.literal_eval(node.value)
        except ValueError:  # papermill writes float('nan') and friends as calls
            value = ast.unparse(node.value)
        declared[name].accept(value)


class Guard:
    """An IPython input transformer that watches for the parameters cell and for what papermill injects after it."""

    def __init__(self):
        self.declared, self.source, self.verdict = {}, None, None

    def __call__(self, lines):
        source = "".join(lines)
        if source != self.source:  # IPython may transform one cell twice: the second time gets the same verdict
            self.source, self.verdict = source, self._judge(source)
        if self.verdict:
            raise ParameterError(self.verdict)
        return lines

    def _judge(self, source):
        try:
            if self.declared and source.lstrip().startswith("# Parameters\n"):
                check_injected(source, self.declared)
                self.declared = {}
            elif _looks_declared(source):
                self.declared = declared_parameters(source)
            else:
                self.declared = {}
        except ParameterError as error:
            return str(error)
        return None


def _looks_declared(source):
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return bool(body) and all(isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) for n in body)
