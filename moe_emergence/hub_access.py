"""Asking the Hugging Face hub without waiting a minute where there is no network."""

_TIMEOUT_S = 10.0


def http_error_type() -> type[Exception]:
    """Base error of the HTTP client that the installed `huggingface_hub` uses."""
    from huggingface_hub.errors import HfHubHTTPError

    # httpx or its successor, depending on the version: it is the base the hub's own error extends
    bases = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return next(base for base in bases if not issubclass(base, OSError))


def check_model_reachable(repo: str) -> None:
    """One request for a model's description; a download would first retry for most of a minute.

    Raises:
        OSError: when the hub, or the model on it, cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repo, timeout=_TIMEOUT_S)
    except http_error_type() as error:
        raise OSError(f"no answer from the Hugging Face hub: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An error as one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
