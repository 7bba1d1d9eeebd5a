"""Counts the registers that values of the kernel's inner loop take, in LLVM IR by clang.

A value is alive from where it is made to its last use, through the next turn where that uses it. What is
alive at one place, in 32-bit registers, is what the loop takes at least in this order of instructions.
Apple's own compiler may choose another order. Knows nothing of what the values are for.
"""

import re

from tests.metal.count_instructions import inner_loop

VALUE = re.compile(r"%[\w.]+")
RESULT = re.compile(r"^\s+(%[\w.]+) = (.*)$")


def live(text: str, multiply: str = "@_Z3fmafff(", barrier: str = "threadgroup_barrier") -> float:
    """The most 32-bit registers that values take at any place of the inner loop of a kernel's LLVM IR."""
    loop = inner_loop(text, multiply, barrier).split("\n")
    made: dict[str, tuple[int, float]] = {}
    ends: dict[str, int] = {}
    again: set[str] = set()  # what a phi takes over from the turn before
    for at, line in enumerate(loop):
        found = RESULT.match(line)
        if found:
            made[found[1]] = at, registers(found[2])
        code = found[2] if found else line
        if code.startswith("phi"):
            again.update(re.findall(r"\[ (%[\w.]+),", code))  # not the labels of where it comes from
        else:
            ends.update(dict.fromkeys(VALUE.findall(code), at))
    whole = len(loop)
    spans = []
    for name, last in ends.items():
        if name not in made:  # from before the loop, for all of its turns
            spans.append((0, whole, _outside(text, name)))
        else:
            start, size = made[name]
            spans.append((start, whole if name in again else last, size))
    return max(sum(size for start, end, size in spans if start <= at < end) for at in range(whole))


def _outside(text: str, name: str) -> float:
    found = re.search(rf"^\s+{re.escape(name)} = (.*)$", text, re.M)
    return registers(found[1]) if found else 0.0  # a label, or an argument


def registers(code: str) -> float:
    """Of an instruction's result, 32 bits each; conditions and addresses of threadgroup memory count one."""
    kind = code
    if code.startswith(("load", "phi")):
        kind = code.split(" ", 1)[1]
    elif match := re.search(r" to ([^,]+)$", code):
        kind = match[1]
    elif code.startswith("getelementptr"):
        return 1.0 if "addrspace(3)" in code.split(",")[1] else 2.0
    elif "extractelement" in code:
        kind = re.sub(r"^extractelement <\d+ x (\w+)>", r"\1", code)
    else:
        kind = re.sub(r"^(tail call|call|\w+)( (noundef|nuw|nsw|exact|fast))*", "", code).strip()
    kind = kind.strip()
    if match := re.match(r"<(\d+) x (\w+)>", kind):
        return int(match[1]) * _width(match[2])
    return _width(kind.split(" ")[0].rstrip(","))


def _width(kind: str) -> float:
    if kind.endswith("*"):
        return 2.0
    return {"i64": 2.0, "double": 2.0, "half": 0.5, "i16": 0.5, "i8": 0.5}.get(kind, 1.0)
