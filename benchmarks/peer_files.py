"""What peers.py compares with: the peers' own environment, and the models in their formats.

Everything lies under build/ and is made once (`peers.py --prepare`): a virtual environment, since the
peers need other versions of packages than tpserve; llama.cpp, compiled from source for this CPU;
a checkpoint with random weights; and each model as GGUF and in OpenVINO's format.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

PROJECT = Path(__file__).resolve().parent.parent
REFERENCE = PROJECT.parent / "shared"
HERE = Path(__file__).resolve().parent
ENVIRONMENT = PROJECT / "build" / "peers-venv"
CACHE = PROJECT / "build" / "peers"

LLAMA_CPP = "llama_cpp_python-0.3.36"
CONVERTER = ["torch==2.13.0", "transformers==5.5.4", "sentencepiece==0.2.1", "pyyaml", "tqdm"]
OPENVINO = ["openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", *CONVERTER]


class PrepareError(Exception):
    """Something that a peer needs cannot be had."""


@dataclass(frozen=True)
class Peers:
    """The environment, and which of the peers are in it."""

    python: Path
    llama_cpp: str | None
    """Its version; None: it is not installed."""
    openvino: str | None


def find_peers() -> Peers:
    """What `prepare_environment` has installed so far."""
    python = ENVIRONMENT / "bin" / "python"
    return Peers(python, _version(python, "llama_cpp"), _version(python, "openvino_genai"))


def prepare_environment() -> None:
    """Install what is missing. A peer that cannot be installed is left out with a line that says so."""
    os.nice(19)  # compiling takes many minutes, and somebody else may be using the machine
    if not (ENVIRONMENT / "bin" / "python").exists():
        venv.create(ENVIRONMENT, with_pip=True)
    for name, prepare in (("llama.cpp", _install_llama_cpp), ("OpenVINO GenAI", _install_openvino)):
        try:
            prepare()
        except PrepareError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)


def _install_llama_cpp() -> None:
    source = CACHE / LLAMA_CPP
    if not source.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        name, _, version = LLAMA_CPP.rpartition("-")
        _pip(
            "download", "--no-deps", "--no-binary", ":all:", "-d", str(CACHE), f"{name}=={version}"
        )
        archive = CACHE / f"{LLAMA_CPP}.tar.gz"
        with tarfile.open(archive) as packed:
            packed.extractall(CACHE, filter="data")
        archive.unlink()
    if not find_peers().llama_cpp:
        _pip("install", *CONVERTER)
        _pip("install", str(source), environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON"})


def _install_openvino() -> None:
    if not find_peers().openvino:
        _pip("install", *OPENVINO)
        # Only for pictures, and what the registry has need not fit the CPU build of torch.
        _pip("uninstall", "--yes", "torchvision")


def random_checkpoint(preset: str) -> Path:
    """A checkpoint in a real model's shape."""
    folder = CACHE / preset
    if not (folder / "config.json").exists():
        tool = REFERENCE / "tools" / "make_checkpoint.py"
        if not tool.exists():
            raise PrepareError(f"there is no {tool}; give a checkpoint with --model")
        _run([sys.executable, str(tool), preset, str(folder)])
    return folder


def gguf(peers: Peers, model: Path, kind: str) -> Path:
    """`model` for llama.cpp, its matrices in `kind`: f32, bf16, q8_0 or q4_0."""
    target = CACHE / "gguf" / f"{model.name}-{kind}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    if kind in ("q8_0", "q4_0"):
        script = str(HERE / "peer_llama_cpp.py")
        source = gguf(peers, model, "bf16")
        _run([str(peers.python), script, "quantize", str(source), str(unfinished), kind])
    else:
        upstream = CACHE / LLAMA_CPP / "vendor" / "llama.cpp"
        command = [str(peers.python), str(upstream / "convert_hf_to_gguf.py")]
        command += [str(_with_embedding(model)), "--outtype", kind, "--outfile", str(unfinished)]
        _run(command)
    return unfinished.rename(target)


def _with_embedding(model: Path) -> Path:
    """`model`, or a copy that has its tied matrix under the name that llama.cpp's converter knows."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    weights = model / "model.safetensors"
    if not weights.exists():
        return (
            model  # in several files: none of the small models that are saved under the head's name
        )
    with safe_open(weights, "pt") as file:
        if embedding in file.keys():  # noqa: SIM118 - not a mapping
            return model
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    copy = CACHE / "renamed" / model.name
    copy.mkdir(parents=True, exist_ok=True)
    for file_beside in model.glob("*.json"):
        shutil.copyfile(file_beside, copy / file_beside.name)
    tensors[embedding] = tensors.pop(head)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def openvino(peers: Peers, model: Path) -> Path:
    """`model` for OpenVINO, its matrices in int8."""
    target = CACHE / "openvino" / f"{model.name}-int8"
    if target.exists():
        return target
    unfinished = target.with_name(f"{target.name}.unfinished")
    command = [str(peers.python.with_name("optimum-cli")), "export", "openvino"]
    command += ["--model", str(model), "--task", "text-generation-with-past"]
    _run([*command, "--weight-format", "int8", str(unfinished)])
    return unfinished.rename(target)


def _version(python: Path, module: str) -> str | None:
    """The version of a module that can be imported there."""
    if not python.exists():
        return None
    command = [str(python), "-c", f"import {module}; print({module}.__version__)"]
    asked = subprocess.run(command, capture_output=True, text=True)
    return None if asked.returncode else asked.stdout.strip()


def _pip(*arguments: str, environment: Mapping[str, str] | None = None) -> None:
    _run([str(ENVIRONMENT / "bin" / "python"), "-m", "pip", *arguments], environment)


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command that reports to standard error only. Raises PrepareError."""
    print("$ " + " ".join(command), file=sys.stderr)
    status = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdout=sys.stderr
    ).returncode
    if status:
        raise PrepareError(f"{Path(command[0]).name} ended with exit code {status}")
