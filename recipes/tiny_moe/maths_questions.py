"""Mathematics text from DeepMind's question generator (PyPI `mathematics-dataset`, Apache-2.0).

The generator was written for Python 3.6, sympy 1.4 and an old numpy; `import_modules` restores the
names that have moved since, and imports the generator from its unpacked wheel. A document is a sheet
of questions of one kind. So a held-out sheet is new, but training has seen questions of its kind.
"""

import collections
import collections.abc
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

QUESTIONS_PER_SHEET = 12


def import_modules(raw: Path) -> dict[str, Callable]:
    """Return {kind: function that samples one problem}, over the generator's training ranges."""
    sys.path[:0] = [str(raw / "mathematics_dataset"), str(raw / "six")]
    import numpy
    import sympy.solvers.diophantine  # noqa: F401  loads the two modules patched below

    for name in ("Iterable", "Mapping", "Sequence", "Callable", "Hashable"):
        setattr(collections, name, getattr(collections.abc, name))
    for name, kind in (("int", int), ("float", float), ("bool", bool), ("object", object)):
        if name not in vars(numpy):
            setattr(numpy, name, kind)
    package = sys.modules["sympy.solvers.diophantine"]  # sympy.solvers hides it with a function
    package.base_solution_linear = sys.modules["sympy.solvers.diophantine.diophantine"].base_solution_linear
    [file] = (raw / "mathematics_dataset").rglob("sample/polynomials.py")
    file.write_text(re.sub(r"(\w+)\.itemset\((\w+), (\w+)\)", r"\1[\2] = \3", file.read_text()))
    from mathematics_dataset.modules import modules

    def easy_half(entropy: tuple[float, float]) -> tuple[float, float]:
        return entropy[0], entropy[0] + (entropy[1] - entropy[0]) * 0.5

    return dict(flatten(modules.train(easy_half)))


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, Callable]]:
    """Walk the generator's tree of modules and yield its leaves with dotted names."""
    for name, node in tree.items():
        if callable(node):
            yield prefix + name, node
        else:
            yield from flatten(node, f"{prefix}{name}.")


def sheets(raw: Path, seconds: float, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (document name, text) for about `seconds`; report and drop kinds that fail or are slow.

    The work is bounded by time, not by count, because some kinds are a thousand times slower than
    others. The same seed gives the same sheets, but their number depends on the machine.
    """
    import numpy

    samplers = import_modules(raw)
    random.seed(seed)
    numpy.random.seed(seed)
    deadline = time.time() + seconds
    number = 0
    while samplers and time.time() < deadline:
        for kind in list(samplers):
            lines, start = [], time.time()
            try:
                while len(lines) < QUESTIONS_PER_SHEET:
                    problem = samplers[kind]()
                    question, answer = str(problem.question), str(problem.answer)
                    if len(question) < 400 and len(answer) < 120:
                        lines.append(f"Question: {question}\nAnswer: {answer}\n")
            except Exception as error:
                print(f"dropped {kind}: {error!r}"[:120], file=sys.stderr)
                del samplers[kind]
                continue
            if time.time() - start > 1.0:
                print(f"dropped {kind}: {time.time() - start:.1f} s per sheet", file=sys.stderr)
                del samplers[kind]
            yield f"sheet-{seed}-{number:05d}-{kind}", "\n".join(lines)
            number += 1
