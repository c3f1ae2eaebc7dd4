"""The installed libraries still accept what we pass to them. What is passed is read from our source, not repeated here.

When a pinned version is raised and one of these fails, the option was renamed or dropped: look before you ship.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BACKEND, ENGINES, CATALOG = (
    f"stakelib/{name}.py" for name in ("training/peft_backend", "models/engines", "models/catalog")
)
GGUF_FILES, LIKELIHOOD = "stakelib/export/gguf_files.py", "stakelib/models/likelihood.py"


def calls(source: str, name: str) -> list[ast.Call]:
    """Calls of `name` (`f(...)` or `anything.f(...)`) in Python source."""
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    return [c for c in found if name in (getattr(c.func, "id", ""), getattr(c.func, "attr", ""))]


def passed(source: str, name: str) -> set[str]:
    """Keyword names passed to `name`; **settings counts with the keys of the dict that is assigned to it."""
    names: set[str] = set()
    for keyword in [k for c in calls(source, name) for k in c.keywords]:
        if keyword.arg:
            names.add(keyword.arg)
        elif isinstance(keyword.value, ast.Name):
            assigned = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assign)]
            dicts = [n.value for n in assigned if ast.unparse(n.targets[0]) == keyword.value.id]
            names |= {ast.literal_eval(key) for d in dicts if isinstance(d, ast.Dict) for key in d.keys if key}
    return names


def refused(source: str, name: str, function: Callable[..., Any]) -> set[str]:
    """Keywords that `function` has no parameter for; **kwargs does not count, it swallows what was renamed."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = {p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds}
    return passed(source, name) - known


def text_of(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def found_at(path: str) -> Any:
    """The object called "module:name.attribute"."""
    module, _, names = path.partition(":")
    thing = importlib.import_module(module)
    for name in names.split("."):
        thing = getattr(thing, name)
    return thing


PASSED = [
    (BACKEND, "TrainingArguments", "transformers:TrainingArguments", 20),
    (BACKEND, "LoraConfig", "peft:LoraConfig", 6),
    (BACKEND, "RowTrainer", "transformers:Trainer", 5),
    (BACKEND, "train", "transformers:Trainer.train", 1),
    (BACKEND, "disable_input_dtype_casting", "peft.helpers:disable_input_dtype_casting", 1),
    (ENGINES, "GgufConfig", "transformers:GgufConfig", 1),
    (CATALOG, "GgufConfig", "transformers:GgufConfig", 1),
    (CATALOG, "snapshot_download", "huggingface_hub:snapshot_download", 2),
    (GGUF_FILES, "add_key_value", "gguf:GGUFWriter.add_key_value", 1),
    ("course.py", "execute_notebook", "papermill:execute_notebook", 5),
    *((BACKEND, "model", f"transformers:{kind}ForCausalLM.forward", 3) for kind in ("Gemma", "Gemma3", "Llama")),
    *((LIKELIHOOD, "model", f"transformers:{kind}ForCausalLM.forward", 2) for kind in ("Gemma", "Gemma3", "Llama")),
]


@pytest.mark.parametrize(("file", "name", "path", "least"), PASSED, ids=lambda x: str(x).rpartition("/")[-1])
def test_keywords_are_still_known(file: str, name: str, path: str, least: int) -> None:
    source, function = text_of(file), found_at(path)
    assert len(passed(source, name)) >= least  # or the call was renamed and nothing is compared
    assert refused(source, name, function) == set()
    assert refused(source, name, lambda **anything: None) == passed(source, name)  # a library that dropped them all


def test_settings_of_papermill_are_read_from_the_dict() -> None:
    assert {"kernel_name", "progress_bar", "stdout_file", "cwd"} <= passed(text_of("course.py"), "execute_notebook")
    from papermill import execute_notebook

    planted = "settings = {'progress_bar': 1, 'no_such': 2}\npapermill.execute_notebook('a', **settings)"
    assert refused(planted, "execute_notebook", execute_notebook) == {"no_such"}
    assert list(inspect.signature(execute_notebook).parameters)[:3] == ["input_path", "output_path", "parameters"]


def test_our_trainer_overrides_what_is_there() -> None:
    from transformers import Trainer, TrainerCallback

    tree = ast.parse(text_of(BACKEND))
    classes = {
        n.name: [f for f in n.body if isinstance(f, ast.FunctionDef)] for n in tree.body if isinstance(n, ast.ClassDef)
    }
    for name, base in (("RowTrainer", Trainer), ("Watch", TrainerCallback)):
        methods = [f for f in classes[name] if not f.name.startswith("__")]
        assert len(methods) >= 2
        assert [f.name for f in methods if not hasattr(base, f.name)] == []
    (loss,) = [f for f in classes["RowTrainer"] if f.name == "compute_loss"]
    assert [a.arg for a in loss.args.args] == list(inspect.signature(Trainer.compute_loss).parameters)


def test_schedules_of_the_recipes_exist() -> None:
    from transformers import SchedulerType

    from stakelib.training import RECIPES

    known = {s.value for s in SchedulerType}
    assert {r.schedule for r in RECIPES.values()} <= known
    assert "no such schedule" not in known


def set_attributes(source: str, name: str) -> set[str]:
    """Dotted attributes of `name` that the source assigns to: params.model.path = ..."""
    targets = [t for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assign) for t in n.targets]
    flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return {ast.unparse(t).partition(".")[2] for t in flat if ast.unparse(t).startswith(f"{name}.")}


def lacks(thing: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        if not hasattr(thing, name):
            return True
        thing = getattr(thing, name)
    return False


def test_llama_cpp_has_the_attributes_that_we_set() -> None:
    import xllamacpp

    wanted = set_attributes(text_of(ENGINES), "params")
    assert {"model.path", "n_parallel", "n_ctx", "cpuparams.n_threads", "hostnames", "verbosity"} <= wanted
    params = xllamacpp.CommonParams()
    assert sorted(a for a in wanted if lacks(params, a)) == []
    assert lacks(params, "model.pfad") and lacks(params, "no_such.thing")
    used = [n.attr for n in ast.walk(ast.parse(text_of(ENGINES))) if isinstance(n, ast.Attribute)]
    for name in ("handle_completions", "listening_address"):
        assert name in used and hasattr(xllamacpp.Server, name)


def test_the_converter_still_knows_our_options() -> None:
    from stakelib.export import converter

    source = ast.get_source_segment(text_of(GGUF_FILES), function_of(GGUF_FILES, "to_gguf")) or ""
    options = set(re.findall(r'"(--\w+)"', source))
    assert options == {"--outfile", "--outtype"}
    environment = {**os.environ, "PYTHONPATH": str(converter().parent), "NO_LOCAL_GGUF": "1", "COLUMNS": "200"}
    command = [sys.executable, str(converter()), "--help"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert done.returncode == 0, done.stderr
    assert [o for o in options if not re.search(rf"{o}\b", done.stdout)] == []
    (kinds,) = set(re.findall(r"--outtype \{([^}]*)\}", done.stdout))
    (kind,) = re.findall(r'"--outtype", "(\w+)"', source)
    assert kind == "f16" and kind in kinds.split(",")
    assert "q4_0" not in kinds.split(",")  # or our own quantising has become superfluous


def function_of(file: str, name: str) -> ast.FunctionDef:
    (found,) = [n for n in ast.parse(text_of(file)).body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found


def test_quantised_types_exist_and_are_written_without_a_compiler() -> None:
    import gguf
    import numpy

    from stakelib.export import QUANTISATIONS

    block = numpy.linspace(-1, 1, 64, dtype="float32").reshape(2, 32)
    for kind in filter(None, QUANTISATIONS.values()):
        assert gguf.quants.quantize(block, gguf.GGMLQuantizationType[kind]).dtype == numpy.uint8
        assert f"MOSTLY_{kind}" in gguf.LlamaFileType.__members__
    with pytest.raises(NotImplementedError):
        gguf.quants.quantize(block.repeat(8, axis=1), gguf.GGMLQuantizationType.Q4_K)


# ------------------------------------------------------------------------------------------------- the guide's table

TOOLS = r"mlx_lm (?:convert|lora|fuse|generate)|convert_hf_to_gguf\.py"
HELP = """
import contextlib, importlib, sys
for name in ("convert", "lora", "fuse", "generate"):
    sys.argv = [name, "--help"]
    print("====", "mlx_lm", name)
    with contextlib.suppress(SystemExit):
        importlib.import_module("mlx_lm." + name).main()
"""


def guide_table() -> list[tuple[str, str]]:
    """(in the guide, here) of each row of the README's table."""
    part = text_of("README.md").partition("## In the guide -> here")[2].partition("\n## ")[0]
    return [tuple(line.strip("| ").split(" | ", 1)) for line in part.splitlines() if line.startswith("| ")][1:]


def named_options(cell: str) -> set[tuple[str, str]]:
    """(tool, option) for every option that a cell names together with its tool, as `mlx_lm lora --data`."""
    found = re.findall(rf"`({TOOLS})((?: --[\w-]+)+)`", cell)
    return {(tool, option) for tool, options in found for option in options.split()}


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each installed tool says of itself."""
    from stakelib import machine
    from stakelib.export import converter

    if machine.mlx()[0] == "none":
        pytest.skip(machine.mlx()[1])
    env = {**os.environ, "PYTHONPATH": str(converter().parent), "NO_LOCAL_GGUF": "1", "COLUMNS": "200"}
    done = [
        subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8", env=e)
        for command, e in ((["-c", HELP], {**os.environ, "COLUMNS": "200"}), ([str(converter()), "--help"], env))
    ]
    parts = done[0].stdout.split("==== ")[1:]
    return {p.partition("\n")[0]: p for p in parts} | {"convert_hf_to_gguf.py": done[1].stdout}


def unknown(options: set[tuple[str, str]], helps: dict[str, str]) -> list[tuple[str, str]]:
    return sorted(o for o in options if not re.search(rf"(?<![\w-]){o[1]}(?![\w-])", helps[o[0]]))


def test_every_option_of_the_table_is_known_to_the_tool(helps: dict[str, str]) -> None:
    rows = guide_table()
    assert len(rows) > 60
    options = set().union(*(named_options(here) for _, here in rows))
    assert {tool for tool, _ in options} == {f"mlx_lm {n}" for n in ("convert", "lora", "fuse", "generate")} | {
        "convert_hf_to_gguf.py"
    }
    assert len(options) >= 20
    assert unknown(options, helps) == []
    gone = {("mlx_lm lora", o) for o in ("--lora-layers", "--adapter-file")} | {("mlx_lm fuse", "--de-quantize")}
    assert unknown(gone, helps) == sorted(gone)  # the guide's own, which no tool has any more


def test_the_conversion_passes_options_that_mlx_lm_knows(helps: dict[str, str]) -> None:
    source = text_of("stakelib/models/mlx_models.py")
    passed_on = {("mlx_lm convert", o) for o in re.findall(r'"(--[\w-]+)"', source)}
    assert passed_on == {("mlx_lm convert", f"--{o}") for o in ("hf-path", "mlx-path", "dtype", "quantize", "q-bits")}
    assert unknown(passed_on, helps) == []
    assert passed_on <= set().union(*(named_options(here) for _, here in guide_table()))


def test_mlx_keywords_are_still_known() -> None:
    from stakelib import machine

    if machine.mlx()[0] == "none":
        pytest.skip(machine.mlx()[1])
    source = text_of("stakelib/training/mlx_backend.py")
    for name, path, least in (
        ("TrainingArgs", "mlx_lm.tuner.trainer:TrainingArgs", 9),
        ("evaluate", "mlx_lm.tuner.trainer:evaluate", 2),
        ("ClippedAdamW", "mlx.optimizers:AdamW", 2),
    ):
        assert len(passed(source, name)) >= least
        assert refused(source, name, found_at(path)) == set()
    trainer = list(inspect.signature(found_at("mlx_lm.tuner.trainer:train")).parameters)
    assert trainer == [
        "model",
        "optimizer",
        "train_dataset",
        "val_dataset",
        "args",
        "loss",
        "iterate_batches",
        "training_callback",
    ]
    assert hasattr(found_at("mlx_lm.tuner.callbacks:TrainingCallback"), "on_train_loss_report")
