"""The architecture, read from the source with `ast`: which file may import which, and the ceilings of a file.

Each rule is one test that lists every line breaking it.
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "tgol_trainer"

# A module or a subpackage of tgol_trainer, to its layer: imports go to strictly lower layers.
LAYERS = {
    "_files": 0,
    "_hub_ids": 0,
    "_quiet": 0,
    "_secrets": 0,
    "_spacing": 0,
    "thresholds": 0,
    "losses": 0,
    "metrics": 0,
    "likelihoods": 1,
    "adapter_files": 2,
    "fingerprint": 2,
    "rewards": 2,
    "adapters": 3,
    "data": 3,
    "config": 3,
    "shapes": 3,
    "families": 4,
    "scaling": 4,
    "labels": 4,
    "converters": 4,
    "caching": 5,
    "objective": 5,
    "saving": 5,
    "sources": 5,
    "checking": 5,
    "evaluation": 5,
    "planning": 5,
    "draws": 6,
    "loading": 6,
    "run": 6,
    "starts": 6,
    "exports": 6,
    "rating": 6,
    "jobs": 6,
    "value_baseline": 7,
    "sampling": 7,
    "trainer": 8,
    "rounds": 9,
    "cli": 10,
}
# What trains never loads the tools beside it, which generate, score, evaluate, convert, check, export or report.
CORE = {
    "_files",
    "_hub_ids",
    "_quiet",
    "_secrets",
    "_spacing",
    "thresholds",
    "losses",
    "metrics",
    "likelihoods",
    "adapter_files",
    "adapters",
}
CORE |= {
    "caching",
    "draws",
    "fingerprint",
    "families",
    "shapes",
    "rewards",
    "data",
    "config",
    "labels",
    "loading",
    "objective",
    "saving",
    "scaling",
    "run",
    "starts",
    "trainer",
    "value_baseline",
}
# The package's own `__init__` stands beside the table. It names classes of any layer and imports them when asked; what
# it imports at once must be light, since every `import tgol_trainer` pays for it. Any layer may ask for its version.
AT_ONCE = {"tgol_trainer._quiet"}
FROM_THE_PACKAGE = {"__version__"}

FILES = sorted(PACKAGE.rglob("*.py"))
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def place(file, node):
    """`jobs/score.py:12`."""
    return f"{file.relative_to(PACKAGE).as_posix()}:{node.lineno}"


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def imported(file):
    """Every absolute module name that a file imports, at its top or inside a function, with its line."""
    package = module_name(file).split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from . import card` names a module, `from .card import write_card` a thing inside one.
                inner = f"{source}.{alias.name}"
                yield (inner if inner in MODULES or source == "tgol_trainer" else source), node.lineno


def unit(name):
    """`tgol_trainer.data.rows` -> `data`: what the table has a layer for."""
    return name.split(".")[1] if "." in name else ""


def only_for_types(file):
    """Lines inside `if TYPE_CHECKING:`."""
    lines = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in node.body:
                lines.update(range(child.lineno, child.end_lineno + 1))
    return lines


# ---- Imports ----


def test_every_module_is_in_the_table_and_the_table_names_nothing_that_is_gone():
    units = {unit(module_name(file)) for file in FILES} - {""}
    assert units == set(LAYERS)


def test_imports_go_to_strictly_lower_layers():
    upward = []
    for file in FILES:
        own = unit(module_name(file))
        for name, line in imported(file) if own else ():
            target = unit(name)
            if name.split(".")[0] != "tgol_trainer" or target in FROM_THE_PACKAGE or target == own:
                continue
            if target not in LAYERS or LAYERS[target] >= LAYERS[own]:
                upward.append(f"{file.relative_to(PACKAGE)}:{line}: {own} ({LAYERS[own]}) imports {name}")
    assert not upward


def test_the_table_in_contributing_is_this_one():
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = {
        (name, int(layer)): bool(dot) for layer, cell in rows for name, dot in re.findall(r"`(\w+)[/.]\S*`( •)?", cell)
    }
    assert told == {(name, layer): name in CORE for name, layer in LAYERS.items() if not name.startswith("_")}


def test_what_trains_imports_nothing_that_stands_beside_it():
    beside = [
        f"{module_name(file)}, line {line}: {name}"
        for file in FILES
        if unit(module_name(file)) in CORE
        for name, line in imported(file)
        if name.split(".")[0] == "tgol_trainer" and unit(name) not in CORE | FROM_THE_PACKAGE | {""}
    ]
    assert not beside


def test_the_package_itself_imports_nothing_at_once_but_what_is_light():
    file = PACKAGE / "__init__.py"
    inside = only_for_types(file)
    assert {name for name, line in imported(file) if name.startswith("tgol_trainer") and line not in inside} == AT_ONCE
    for name in AT_ONCE:
        libraries = {target.split(".")[0] for target, _ in imported(ROOT / f"{name.replace('.', '/')}.py")}
        assert libraries <= set(sys.stdlib_module_names)


def test_files_of_one_subpackage_do_not_import_each_other_in_a_circle():
    edges = defaultdict(set)
    for file in FILES:
        name = module_name(file)
        edges[name] |= {target for target, _ in imported(file) if target in MODULES and unit(target) == unit(name)}
        edges[name].discard("tgol_trainer")
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for target in sorted(edges[name]):
            visit(target)
        done.add(path.pop())

    for name in sorted(MODULES):
        visit(name)


@pytest.mark.parametrize(
    ("layer", "allowed"), [(0, {"torch", "numpy"}), (1, {"torch"})], ids=["tensors alone", "torch alone"]
)
def test_the_two_lowest_layers_import_no_other_library(layer, allowed):
    checked = 0
    for file in FILES:
        if LAYERS.get(unit(module_name(file))) != layer:
            continue
        checked += 1
        inside = only_for_types(file)
        for name, line in imported(file):
            library = name.split(".")[0]
            if library == "diffusers" and line in inside and layer == 1:
                continue
            if (file.stem, library) == ("_hub_ids", "huggingface_hub"):  # asked when called, for its rule of an id
                continue
            known = library in allowed or library in sys.stdlib_module_names or library == "tgol_trainer"
            assert known, f"{file.name}, line {line}: {name}"
    assert checked == len([name for name in MODULES if LAYERS.get(unit(name)) == layer]) > 0


# What waits for other processes. Inside a branch that one process takes and another does not, it waits for ever.
COLLECTIVES = {"all_gather", "all_gather_object", "all_reduce", "all_to_all", "allreduce", "barrier", "broadcast"}
COLLECTIVES |= {"broadcast_object_list", "gather", "gather_for_metrics", "gather_object", "gather_function", "scatter"}
COLLECTIVES |= {
    "nested_gather",
    "reduce_scatter",
    "wait_for_everyone",
    "main_process_first",
    "local_main_process_first",
}
COLLECTIVES |= {"pad_across_processes", "monitored_barrier", "send", "recv"}


def test_only_the_trainer_calls_collectives_and_hands_gather_to_the_metrics():
    used = defaultdict(set)
    for file in FILES:
        name = unit(module_name(file))
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
                used[name].add(f".{node.attr}")
            elif isinstance(node, ast.Name) and node.id in COLLECTIVES:
                used[name].add(node.id)
        for target, _ in imported(file):
            if target.startswith(("torch.distributed", "accelerate")):
                used[name].add(target)
    assert used.pop("metrics") == {"gather"}  # a parameter, not a method of anything
    assert used.pop("trainer") == {
        "gather_object",
        ".gather",
        ".main_process_first",
        ".wait_for_everyone",
        "accelerate.utils",
    }
    saving = {"gather", "gather_object", ".gather", ".wait_for_everyone", ".all_reduce", "accelerate.utils"}
    saving |= {".barrier", "torch.distributed.distributed_c10d"}  # the signs of life
    assert used.pop("saving") == saving
    assert used.pop("data") == {".all_reduce"}  # the end of a pass over a stream
    assert used.pop("adapter_files") == {"torch.distributed.fsdp", "torch.distributed.tensor"}  # shards of weights
    assert used.pop("run") == {"gather"}  # what the trainer hands over
    assert used.pop("sampling") == {".gather"}
    assert not used


def test_the_metrics_take_gather_as_an_argument_and_call_it_in_one_place():
    nodes = list(ast.walk(tree(PACKAGE / "metrics.py")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    takers = [function for function in functions if "gather" in {argument.arg for argument in function.args.args}]
    assert [function.name for function in takers] == ["pop"]
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "gather"]
    assert len(calls) == 1


# ---- Ceilings ----


def functions_of(node, prefix=""):
    """Every function below a node, with its dotted name: `TGOLTrainer.__init__`."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, FUNCTION | ast.ClassDef)
        if isinstance(child, FUNCTION):
            yield prefix + child.name, child
        yield from functions_of(child, f"{prefix}{child.name}." if named else prefix)


def parameters_of(function):
    """Every parameter but `self` and `cls`; `*args` and `**kwargs` are one each."""
    extras = [extra for extra in (function.args.vararg, function.args.kwarg) if extra is not None]
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument for argument in named if argument.arg not in ("self", "cls")] + extras


ALL_FUNCTIONS = [(file, name, function) for file in FILES for name, function in functions_of(tree(file))]


def test_a_file_has_at_most_500_lines_and_the_trainer_700():
    lengths = {module_name(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    ceilings = dict.fromkeys(lengths, 500) | {"tgol_trainer.trainer": 700}
    assert not {name: length for name, length in lengths.items() if length > ceilings[name]}


def test_a_function_has_at_most_80_lines():
    lengths = {place(file, node): node.end_lineno - node.lineno + 1 for file, _, node in ALL_FUNCTIONS}
    assert not {where: length for where, length in lengths.items() if length > 80}


# Constructors that repeat the signature of another library's class, so that its users find what they know.
MIRRORED = {"trainer.py: TGOLTrainer.__init__": "the arguments of transformers.Trainer and TRL's trainers"}


def test_a_function_has_at_most_eight_parameters():
    found = {
        f"{file.relative_to(PACKAGE).as_posix()}: {name}"
        for file, name, function in ALL_FUNCTIONS
        if len(parameters_of(function)) > 8
    }
    assert found == set(MIRRORED)  # an exception that is no longer needed goes


def test_nothing_is_asserted_and_only_commands_print():
    found = []
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Assert):
                found.append(f"{place(file, node)}: assert, which `python -O` removes")
            if isinstance(node, ast.Name) and node.id == "print" and unit(module_name(file)) != "cli":
                found.append(f"{place(file, node)}: print")
    assert not found


def test_every_argument_and_every_result_is_annotated():
    bare = []
    for file, name, function in ALL_FUNCTIONS:
        where = f"{place(file, function)}: {name}"
        bare += [f"{where}({each.arg})" for each in parameters_of(function) if each.annotation is None]
        bare += [] if function.returns is not None else [f"{where} -> ?"]
    assert not bare


# ---- Import ----


def test_importing_the_package_loads_nothing_but_the_standard_library_and_two_of_its_own_modules():
    """What decides how long `import tgol_trainer` takes, and unlike seconds it is the same on a busy machine."""
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import tgol_trainer\n"
        "print(tgol_trainer.__file__, *sorted(set(sys.modules) - before))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    file, *loaded = output
    assert Path(file) == PACKAGE / "__init__.py"
    assert {name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names} == {
        "tgol_trainer",
        "tgol_trainer._quiet",
    }
    assert len(loaded) <= 60


# ---- The tests ----


def test_no_test_module_imports_another():
    found = set()
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for name, _ in imported(file):
            if any(part.startswith("test_") for part in name.split(".")):
                found.add(f"{file.relative_to(ROOT).as_posix()}: {name}")
    assert not found


# ---- The repository ----


def test_no_file_of_the_repository_names_a_path_of_the_machine_it_was_written_on():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the repository is not known")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, timeout=60).stdout.split(b"\0")
    files = [ROOT / name.decode() for name in names if name]
    assert PACKAGE / "trainer.py" in files
    # Written with a gap, so that this file does not find itself.
    pattern = re.compile(rb"/wo[r]k/|/tmp/bas[h]|\.\./share[d]|/ro[o]t/")
    found = {}
    for file in files:
        if file.is_file() and (match := pattern.search(file.read_bytes())):
            found[str(file.relative_to(ROOT))] = match[0]
    assert not found
