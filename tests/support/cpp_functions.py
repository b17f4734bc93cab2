"""Which functions a C++ source defines in a namespace: as much of a parser as telling two of one name apart needs."""

import re

_COMMENT = r"//[^\n]*|/\*.*?\*/"
_LITERAL = r"""\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'"""
_PREPROCESSOR = r"^[ \t]*#(?:\\\n|[^\n])*"
_IGNORED = re.compile(f"{_COMMENT}|{_LITERAL}|{_PREPROCESSOR}", re.S | re.M)
_FUNCTION = re.compile(r"([\w:~]+|operator\s*\S+?)\s*\((.*)\)\s*(?:const|noexcept)*\s*(?:->.*|:[^:].*)?$", re.S)


def _parameter_type(parameter):
    """Without default value and name."""
    words = re.sub(r"\s*=.*", "", " ".join(parameter.split()), flags=re.S)
    return re.sub(r"(?<=[\w>&*\s])(?<!^)\b[A-Za-z_]\w*(\[[^]]*\])?$", r"\1", words).replace(" ", "") or words


def _split(parameters):
    """At the commas that lie in no brackets."""
    depth, start, parts = 0, 0, []
    for i, c in enumerate(parameters):
        depth += (c in "<([{") - (c in ">)]}")
        if c == "," and not depth:
            parts.append(parameters[start:i])
            start = i + 1
    return [p for p in [*parts, parameters[start:]] if p.strip()]


def functions(text):
    """{(namespace, name, parameter types)} of what is defined at namespace scope and may be seen by other files: not
    `static`, in no nameless namespace."""
    text, found, scopes, start = _IGNORED.sub(" ", text), set(), [], 0
    for mark in re.finditer(r"[{};]", text):
        head, start = text[start : mark.start()].strip(), mark.end()
        if mark[0] == "}":
            scopes.pop()
        if mark[0] != "{":
            continue
        outside = all(kind == "namespace" for kind, _ in scopes)
        if space := re.search(r"\bnamespace\b\s*([\w:]*)$", head):
            scopes.append(("namespace", space[1] or "static"))
            continue
        scopes.append(("body", ""))
        names = [name for _, name in scopes[:-1]]
        function = _FUNCTION.search(re.sub(r"^template\s*<[^{}]*?>\s*(?=\w)", "", head))
        if outside and function and "static" not in (*names, *re.findall(r"\w+", head[: head.find("(")])):
            types = ",".join(_parameter_type(p) for p in _split(function[2]))
            found.add(("::".join(names), function[1], types))
    return found
