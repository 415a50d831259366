"""Shared fixtures: a small folder of data, and configurations that train on it in a second."""

import gc
import importlib.util
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Triton decides when a kernel (its own helpers included) is decorated: before anything else
    # imports it, and without a variable that the commands under test would inherit
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language

    del os.environ["TRITON_INTERPRET"]
    triton.knobs.runtime.interpret = True

from small_texts import write_texts
from warm_commands import alone, share_one_server

from moe_emergence.config import ModelConfig, RunConfig
from moe_emergence.flags import flag
from moe_emergence.presets import demo
from moe_emergence.words import written

REPOSITORY = Path(__file__).resolve().parent.parent
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the Triton kernels run under test: on the GPU, or on CPU tensors in the interpreter."""


# a busy machine is not a slow test
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")
settings.register_profile("long", settings.get_profile("tests"), print_blob=True)
"""What the tests in faults/ take for more examples, see `mutated.often`."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between processes as UTF-8, and names of files need not be."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_configure() -> None:
    share_one_server()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A worker for each core where pytest-xdist is there, but none to debug or to measure in."""
    alone = config.getoption("usepdb") or config.getoption("--benchmark-only", default=False)
    is_worker = hasattr(config, "workerinput")
    if config.getoption("numprocesses", default=0) is None and not alone and not is_worker:
        config.option.numprocesses = min(os.cpu_count() or 1, 8)
        config.option.dist = "loadfile"  # fixtures of a file are made once
        config.option.loadscopereorder = False
        config.option.benchmark_disable = True


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Benchmarks are measured without the tests, which would only be skipped."""
    return True if config.getoption("--benchmark-only", default=False) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those of many: no worker ends alone with a long one.

    The whole grid of compilations is for `-m grid` alone.
    """
    sizes = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -sizes[item.path]))
    if "grid" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("grid"):
                item.add_marker(pytest.mark.skip(reason="compiled by pytest -m grid"))


def pytest_collection_finish() -> None:
    """What imports left is no garbage to search: some libraries collect with every call."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Deprecations(logging.Handler):
    """What dependencies log, rather than warn, about names that will go."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message or "will be removed" in message:
            self.messages.append(f"{record.name}: {message}")


@pytest.fixture(autouse=True)
def _no_hoarded_memory() -> Iterator[None]:
    """Many processes share one GPU, and what each has cached the others lack."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _no_logged_deprecations() -> Iterator[None]:
    heard = Deprecations()
    loggers = [logging.getLogger(n) for n in ("transformers", "accelerate", "datasets", "torch")]
    for logger in loggers:
        logger.addHandler(heard)
    yield
    for logger in loggers:
        logger.removeHandler(heard)
    assert not heard.messages, heard.messages


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `--data` folder with 40 short documents a domain, each domain with words of its own."""
    folder = tmp_path_factory.mktemp("data")
    write_texts(folder)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_config(data_folder: Path, cache_folder: Path, tmp_path: Path) -> RunConfig:
    """The demo at toy size: 2 layers, the second one a mixture; 4 base steps, then 6."""
    return tiny(data_folder, cache_folder, tmp_path)


def tiny(data_folder: Path, cache_folder: Path, where: Path) -> RunConfig:
    """`tiny_config` for a run in `where`."""
    config = demo()
    return replace(
        config,
        run_name="tiny",
        output_dir=str(where / "runs"),
        device="cpu",
        model=ModelConfig(
            base="scratch", n_layer=2, n_embd=16, n_head=2, moe_layers=(1,), num_experts=4
        ),
        data=replace(
            config.data,
            data=str(data_folder),
            cache_dir=str(cache_folder),
            block_size=16,
            vocab_size=300,
            token_types=("code=python", "math=math", "prose=words"),
        ),
        optim=replace(
            config.optim,
            max_steps=6,
            pretrain_steps=4,
            batch_size=4,
            compare_dense=False,
            compare_null=False,
        ),
        monitor=replace(
            config.monitor,
            eval_every=3,
            eval_blocks=4,
            save_every=3,
            keep_last_k=3,
            log_every=2,
            log_router_every=2,
            collapse_every=2,
            track="none",
        ),
    )


@pytest.fixture
def tiny_flags(tiny_config: RunConfig) -> list[str]:
    """`tiny_config` as command-line flags on top of the demo preset."""
    return flags_of(tiny_config)


def flags_of(config: RunConfig) -> list[str]:
    """Every setting of `config` as flags."""
    flags: list[str] = []
    groups = (config, config.model, config.data, config.optim, config.monitor)
    for name, value in ((n, v) for group in groups for n, v in vars(group).items()):
        if not is_dataclass(value):
            flags += [flag(name), *written(value)]
    return flags


ACCELERATE = ("accelerate", "launch", "--num_processes", "2", "--cpu")
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")
"""The launchers as the documents show them; test_training_distributed.py starts both."""

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run `python …` in an empty folder with one thread; stdout and stderr are captured."""

    def run_command(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
        where = tmp_path / "elsewhere"
        where.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, *arguments],
            **{
                "cwd": where,
                "env": command_environment(),
                "capture_output": True,
                "text": True,
                "timeout": 300,
                "check": False,
                **options,
            },
        )

    return run_command


def command_environment() -> dict[str, str]:
    """The environment for a subprocess: the package importable from any folder, one thread."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return {**alone(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def compile_process(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Python with a compilation cache of its own, and never in the interpreter."""
    environment = {**command_environment(), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(autouse=True)
def _fresh_accelerator_state() -> Iterator[None]:
    """Accelerate keeps device and precision in a process-wide object; each test starts without.

    None is left either, since the next file's own fixtures come before this one.
    """
    _forget_accelerator_state()
    yield
    _forget_accelerator_state()


def _forget_accelerator_state() -> None:
    # looked up, not imported: kernel and layer tests run on machines that lack it
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
