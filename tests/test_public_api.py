"""What every public function promises, and what `import spatialfm` must not do."""

from __future__ import annotations

import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import spatialfm as sfm

ROOT = Path(__file__).parents[1]
MODULES = ("datasets", "get", "models", "pl", "pp", "tl", "train")
# They read an AnnData, and some write to it.
ON_ANNDATA = ("get", "pl", "pp", "tl")
WRITING = ("pp", "tl")
# They return a new object and leave the AnnData as it is.
READING = [("pp", "patches"), ("tl", "outcome")]
# They do not take an AnnData.
WITHOUT_ANNDATA = [("pp", "squidpy_builder")]
PUBLIC = [(module, name) for module in MODULES for name in getattr(sfm, module).__all__]
FUNCTIONS = [(module, name) for module, name in PUBLIC if inspect.isfunction(getattr(getattr(sfm, module), name))]


@pytest.fixture(params=FUNCTIONS, ids=".".join)
def function(request):
    module, name = request.param
    return module, getattr(getattr(sfm, module), name)


def test_signature(function):
    module, func = function
    parameters = inspect.signature(func).parameters
    positional = [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert len(positional) <= 3
    if module in ON_ANNDATA and (module, func.__name__) not in WITHOUT_ANNDATA:
        assert positional[0] == "adata"
    if module in WRITING and (module, func.__name__) not in READING + WITHOUT_ANNDATA:
        copy = parameters["copy"]
        assert copy.kind is copy.KEYWORD_ONLY
        assert copy.default is False
    annotated = [p.name for p in parameters.values() if p.annotation is not p.empty]
    assert annotated == list(parameters)
    assert inspect.signature(func).return_annotation is not inspect.Signature.empty


def sections(doc):
    """Numpydoc sections: title to text."""
    parts = re.split(r"^([A-Z][\w ]+)\n-{3,}\n", doc, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_docstring(function):
    _, func = function
    doc = inspect.getdoc(func)
    assert doc
    assert doc.splitlines()[0].endswith(".")
    found = sections(doc)
    returns_nothing = inspect.signature(func).return_annotation == "None"
    assert ("Returns" in found) != returns_nothing
    names = list(inspect.signature(func).parameters)
    heads = [line for line in found.get("Parameters", "").splitlines() if re.match(r"\w", line)]
    described = [name.strip() for line in heads for name in line.split(",")]
    assert sorted(described) == sorted(names)
    assert all(":" not in line for line in heads), "types belong in the signature only"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_reexported(module):
    """`__all__` is complete."""
    package = getattr(sfm, module)
    submodules = {m.name for m in pkgutil.iter_modules(package.__path__)}
    given = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and name not in submodules and (inspect.isfunction(value) or inspect.isclass(value))
    }
    assert given <= set(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)


def test_modules_are_listed():
    assert set(MODULES) | {"__version__", "settings"} == set(sfm.__all__) == set(dir(sfm))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sfm.nonsense  # noqa: B018


HEAVY = ["torch", "squidpy", "scanpy", "matplotlib", "torch_geometric", "numba"]


def loaded_by(statement, modules):
    code = f"import sys; {statement}; print(*[name for name in {modules} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_import_is_light():
    """Only the standard library is loaded until something is used."""
    assert loaded_by("import spatialfm", [*HEAVY, "anndata", "pandas", "scipy", "numpy"]) == []


@pytest.mark.parametrize("module", ["datasets", "get", "pl", "pp", "tl"])
def test_modules_load_without_heavy_libraries(module):
    assert loaded_by(f"import spatialfm; spatialfm.{module}", HEAVY) == []


def test_files_name_no_machine():
    """No file of the repository names a path outside of it."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # Character classes, so that this file does not name them either.
    pattern = re.compile(r"[.][.]/[s]hared|(?<![\w.}])/([w]ork|[t]mp|[h]ome|[U]sers|[r]oot)/")
    found = []
    for name in listed.splitlines():
        path = ROOT / name
        if not path.is_file() or path.suffix in {".gz", ".h5ad", ".npz", ".pth", ".safetensors", ".png", ".jpg"}:
            continue
        found += [f"{name}: {line.strip()}" for line in path.read_text("utf-8").splitlines() if pattern.search(line)]
    assert found == []
