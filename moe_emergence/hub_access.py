"""Asking the Hugging Face hub without waiting a minute where there is no network."""

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

_TIMEOUT_S = 10.0


def http_error_type() -> type[Exception]:
    """Base error of the HTTP client that the installed `huggingface_hub` uses."""
    # httpx or its successor, depending on the version: it is the base the hub's own error extends
    bases = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return next(base for base in bases if not issubclass(base, OSError))


def check_model_reachable(repo: str) -> None:
    """One request for a model's description; a download would first retry for most of a minute.

    Raises:
        OSError: when the hub, or the model on it, cannot be reached.
    """
    try:
        HfApi().model_info(repo, timeout=_TIMEOUT_S)
    except http_error_type() as error:
        raise OSError(f"the Hugging Face hub gave no answer: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
