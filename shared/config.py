"""Settings of the server: where each value comes from, and the one place that validates them.

Flags win over environment variables (`TPSERVE_*`), those over a TOML file (`--config FILE`), those
over the defaults. A `Settings` object is frozen.
"""

import argparse
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from shared.errors import ConfigError
from shared.http_address import DEFAULT_HTTP, parse_http_address
from shared.messages import Precision

PROJECT_ROOT = Path(__file__).resolve().parent.parent
LOOPBACK_HOSTS = ("127.0.0.1", "localhost")
AUTO_WORKERS = 0
"""The coordinator chooses before anything else looks at the number."""
_BYTE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _demo_models() -> dict[str, str]:
    models = PROJECT_ROOT / "models"
    return {"story": str(models / "demo-story"), "chat": str(models / "demo-chat")}


class Settings(Struct, frozen=True, kw_only=True):
    """Every option of `tpserve serve`."""

    workers: Annotated[
        int,
        Meta(ge=1, description="worker processes; auto: what is predicted to be fastest here"),
    ] = 1
    auto_dtypes: Annotated[
        str,
        Meta(description="precisions that --workers auto may choose besides --dtype, by comma"),
    ] = ""
    model: Annotated[
        dict[str, str],
        Meta(
            min_length=1,
            description="NAME=MODEL, a folder or ORG/NAME[@REVISION] of the hub; repeatable",
        ),
    ] = msgspec.field(default_factory=_demo_models)
    offline: Annotated[
        bool, Meta(description="take models of the hub from the cache, and do not ask the hub")
    ] = False
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"],
        Meta(description="precision of the weights; auto: the checkpoint's"),
    ] = "auto"
    kv_dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"],
        Meta(
            description="precision of the KV cache; auto: the weights', bf16 if those are int8 or int4"
        ),
    ] = "auto"
    device: Annotated[
        Literal["cpu", "cuda"],
        Meta(description="what the workers compute with; cuda: a GPU for each"),
    ] = "cpu"
    deterministic: Annotated[
        bool,
        Meta(
            description="with --device cuda: a token's logits depend on its sequence alone, not on the"
            " batch or the number of workers; slower"
        ),
    ] = False
    comm: Annotated[
        Literal["shm", "zmq", "gloo", "nccl"],
        Meta(description="what carries the workers' all-reduce; nccl: with --device cuda only"),
    ] = "shm"
    virtual_shards: Annotated[
        int,
        Meta(ge=1, le=64, description="shards every model is cut into; a power of two"),
    ] = 8
    threads_per_worker: Annotated[
        int, Meta(ge=0, le=1024, description="compute threads; 0: cores / workers, at least 1")
    ] = 0
    pin_cores: Annotated[bool, Meta(description="bind each worker to its own cores")] = False
    listen: Annotated[
        str, Meta(description="ZeroMQ address for clients; port * picks a free one")
    ] = "tcp://127.0.0.1:5555"
    http: Annotated[
        str,
        Meta(description="HOST:PORT of the HTTP API, port 0 picks a free one; --no-http: none"),
    ] = DEFAULT_HTTP
    max_model_len: Annotated[
        int, Meta(ge=0, description="longest prompt + answer in tokens; 0: the model's own limit")
    ] = 0
    max_num_seqs: Annotated[
        int, Meta(ge=1, le=4096, description="sequences that advance in one step at most")
    ] = 64
    max_batched_tokens: Annotated[
        int, Meta(ge=16, le=1 << 20, description="tokens computed in one step at most")
    ] = 256
    kv_memory: Annotated[
        str,
        Meta(description="KV cache of all models per worker, such as 2G; auto: a share of free"),
    ] = "auto"
    shard_cache: Annotated[
        str, Meta(description="folder for packed int8 and int4 weights: the next load is faster")
    ] = ""
    pipeline_depth: Annotated[
        int, Meta(ge=1, le=8, description="step plans sent ahead; 1: wait for each result")
    ] = 2
    steps_per_plan: Annotated[
        int,
        Meta(ge=1, le=64, description="decode steps that one plan may have while they are short"),
    ] = 8
    queue_limit: Annotated[int, Meta(ge=1, description="jobs that may wait")] = 1024
    queue_tokens: Annotated[
        int, Meta(ge=1, description="prompt tokens that may wait, over all jobs")
    ] = 1 << 20
    story_weight: Annotated[
        int, Meta(ge=1, le=100, description="stories that start in a round with the chats")
    ] = 1
    chat_weight: Annotated[
        int, Meta(ge=1, le=100, description="chats that start in a round with the stories")
    ] = 1
    embedding_weight: Annotated[
        int, Meta(ge=1, le=100, description="embedding requests that start in such a round")
    ] = 1
    step_timeout: Annotated[
        float,
        Meta(gt=0, le=86400, description="seconds after which a silent worker counts as lost"),
    ] = 60.0
    run_dir: Annotated[
        str, Meta(description="folder for sockets, made with mode 0700; empty: a temporary one")
    ] = ""
    database: Annotated[
        str,
        Meta(
            description="where sessions and submitted jobs are kept: sqlite:///FILE or postgresql+psycopg://URL; auto: "
            "tpserve.db in the user's data folder; none: neither"
        ),
    ] = "auto"
    job_keep: Annotated[
        int,
        Meta(
            ge=0,
            le=10 * 365 * 86_400,
            description="seconds that submitted jobs are kept after their end",
        ),
    ] = 7 * 86_400
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="how much to log")
    ] = "info"

    @property
    def kv_memory_bytes(self) -> int | None:
        """`kv_memory` in bytes; None for auto."""
        return None if self.kv_memory == "auto" else parse_bytes(self.kv_memory)

    @property
    def threads(self) -> int:
        """Compute threads of each worker."""
        return self.threads_per_worker or max(1, self.cores // self.workers)

    @property
    def cores(self) -> int:
        """That this process may use."""
        return len(os.sched_getaffinity(0))

    @property
    def auto_dtype_list(self) -> list[Precision]:
        """`auto_dtypes`. Raises ConfigError."""
        try:
            return msgspec.convert(
                [name for name in self.auto_dtypes.split(",") if name], list[Precision]
            )
        except msgspec.ValidationError:
            raise ConfigError(
                f"auto_dtypes is {self.auto_dtypes!r}: write some of"
                f" {', '.join(get_args(Precision))}, by comma"
            ) from None


class Sourced(Struct, frozen=True):
    """Settings, and for each field where its value came from."""

    settings: Settings
    sources: dict[str, str]

    def describe(self) -> str:
        """A line for each setting: name, value, source."""
        lines = []
        for name, source in self.sources.items():
            value = getattr(self.settings, name)
            if isinstance(value, dict):
                value = ", ".join(f"{k}={v}" for k, v in value.items())
            if name == "workers" and value == AUTO_WORKERS:
                value = "auto"
            if name == "database":
                value = without_password(value)
            lines.append(f"{name:20} {value!s:40} {source}")
        return "\n".join(lines)


def parse_bytes(text: str) -> int:
    """A size such as 512M or 1.5GB (units of 1024) in bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is not a size: write for example 512M or 2G")
    return int(float(match[1]) * _BYTE_UNITS[match[2].upper()])


def without_password(url: str) -> str:
    """A database's URL as people may see it."""
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)


def argument_parser(
    prog: str = "tpserve serve", what: str = "Start the coordinator and its workers."
) -> argparse.ArgumentParser:
    """The flags of `tpserve serve`; a flag that is not given stays absent."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"{what} Every option can also be set as an "
        "environment variable (--max-model-len: TPSERVE_MAX_MODEL_LEN) or in a TOML file "
        "(max_model_len = 1024); flags win over the environment, that over the file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    parser.add_argument(
        "--print-config", action="store_true", help="print every setting and its source, then exit"
    )
    defaults = Settings()
    for name, hint in _field_types().items():
        kind, meta = hint.__origin__, hint.__metadata__[0]
        flag = "--" + name.replace("_", "-")
        shown = getattr(defaults, name)
        if name == "model":
            text = f"{meta.description} (default: the bundled demo models as story and chat)"
            parser.add_argument(flag, action="append", metavar="NAME=MODEL", help=text)
        elif kind is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, help=f"{meta.description}"
            )
        else:
            text = f"{meta.description} (default: {shown if shown != '' else 'empty'})"
            choices = getattr(kind, "__args__", None)
            metavar = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
            parser.add_argument(flag, metavar=metavar, help=text.replace("%", "%%"))
    parser.add_argument(
        "--no-http",
        dest="http",
        action="store_const",
        const="",
        help="serve no HTTP; in a file or the environment: an empty http",
    )
    return parser


def load_settings(flags: argparse.Namespace, environ: Mapping[str, str]) -> Sourced:
    """Merge all sources and validate.

    Raises ConfigError naming the setting, its source, the value seen and what is allowed.
    """
    given = vars(flags)
    file_values = _read_file(Path(given["config"])) if "config" in given else {}
    defaults = Settings()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, hint in _field_types().items():
        variable = "TPSERVE_" + name.upper()
        if name in given:
            raw, source = given[name], "flag --" + name.replace("_", "-")
        elif variable in environ:
            raw, source = environ[variable], f"environment {variable}"
        elif name in file_values:
            raw, source = file_values[name], f"file {given['config']}"
        else:
            raw, source = getattr(defaults, name), "default"
        values[name] = _convert(name, raw, hint, source)
        sources[name] = source
    settings = Settings(**values)
    _check(settings)
    return Sourced(settings, sources)


def _field_types() -> dict[str, Any]:
    return {
        name: hint
        for name, hint in get_type_hints(Settings, include_extras=True).items()
        if hasattr(hint, "__metadata__")
    }


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    unknown = sorted(values.keys() - _field_types().keys())
    if unknown:
        raise ConfigError(f"--config {path}: unknown setting {unknown[0]!r}")
    return values


def _convert(name: str, raw: Any, hint: Any, source: str) -> Any:
    if name == "model" and not isinstance(raw, dict):
        raw = _parse_models(raw if isinstance(raw, list) else raw.split(","), source)
    if isinstance(raw, str) and hint.__origin__ is bool:
        raw = raw.lower()
    if name == "workers" and raw == "auto":
        return AUTO_WORKERS
    try:
        return msgspec.convert(raw, hint, strict=not isinstance(raw, str))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name} ({source}) is {raw!r}: {error}") from None


def _parse_models(items: Sequence[str], source: str) -> dict[str, str]:
    models: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (equals and path and re.fullmatch(r"[\w.:-]{1,256}", name)):
            raise ConfigError(f"model ({source}) is {item!r}: write NAME=MODEL, as chat=models/x")
        if name in models:
            raise ConfigError(f"model ({source}) names {name!r} twice")
        models[name] = path
    return models


def _check(settings: Settings) -> None:
    """What no single field can tell."""
    if settings.auto_dtype_list and settings.workers != AUTO_WORKERS:
        raise ConfigError(
            f"auto_dtypes is {settings.auto_dtypes!r}, but workers is {settings.workers}:"
            " a precision is chosen with --workers auto only"
        )
    if settings.comm == "nccl" and settings.device == "cpu":
        raise ConfigError(
            "comm is 'nccl', but device is 'cpu': NCCL is for --device cuda; use shm, zmq or gloo"
        )
    if settings.deterministic and settings.device == "cpu":
        raise ConfigError(
            "deterministic is set, but device is 'cpu', where the native kernels always are: leave it out,"
            " or use --device cuda"
        )
    if settings.device == "cuda" and settings.workers == AUTO_WORKERS:
        raise ConfigError(
            "workers is 'auto', but device is 'cuda': what is measured for auto is the CPU; give the"
            " number of GPUs"
        )
    shards = settings.virtual_shards
    if shards & (shards - 1):
        raise ConfigError(f"virtual_shards is {shards}, it must be a power of two")
    if settings.workers > shards:
        raise ConfigError(
            f"workers is {settings.workers}, but a model is cut into {shards} virtual shards and "
            f"each worker needs one: use at most {shards}, or raise --virtual-shards"
        )
    if settings.kv_memory_bytes == 0:
        raise ConfigError(
            "kv_memory is 0: the KV cache needs memory; write auto, or for example 2G"
        )
    _check_address(settings.listen)
    if settings.http:
        parse_http_address(settings.http)
    _check_database(settings.database)


def _check_address(address: str) -> None:
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        return
    match = re.fullmatch(r"tcp://(.+):(\d{1,5}|\*)", address)
    if match is None or (match[2] != "*" and not 0 < int(match[2]) < 65536):
        raise ConfigError(
            f"listen is {address!r}: write tcp://127.0.0.1:5555 (or port *), or ipc:///PATH"
        )
    if match[1] not in LOOPBACK_HOSTS:
        raise ConfigError(
            f"listen is {address!r}: only loopback addresses are allowed, because clients are not "
            "authenticated yet; use an SSH tunnel to reach the server from another machine"
        )


def _check_database(url: str) -> None:
    if url in ("auto", "none") or re.fullmatch(r"sqlite:///.+|postgresql\+psycopg://.+", url):
        return
    raise ConfigError(
        f"database is {without_password(url)!r}: write sqlite:///FILE, "
        "postgresql+psycopg://USER@HOST/NAME, auto, or none"
    )
