"""Find out quickly whether the Hugging Face Hub can be reached; its own client would retry for half a minute."""

from __future__ import annotations

import urllib.error
import urllib.request

from huggingface_hub import constants, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

PROBE_TIMEOUT_S = 5.0


def unreachable_reason() -> str:
    """Return why the Hub cannot be reached, or an empty string if it can. Earlier downloads are usable either way.

    After a failure the process is offline, as with HF_HUB_OFFLINE=1: the Hub's client reads its cache and does not
    retry, and the next call returns at once.
    """
    if constants.HF_HUB_OFFLINE:
        return "this process is offline (HF_HUB_OFFLINE, or an earlier attempt failed)"

    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError:
        return ""  # any HTTP status, even an error, comes from a server that can be reached
    except OSError as error:
        constants.HF_HUB_OFFLINE = True
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return f"{constants.ENDPOINT}: {reason}"


def refused_access(source: str, error: RepositoryNotFoundError) -> str:
    """Return why the Hub refuses a model, and what to do, as sentences.

    Args:
        source: Hub id.
        error: what its client raised; the Hub does not tell a private model from one that does not exist.
    """
    token = "the token in use has no access" if get_token() else "no token is set"
    login = "run `hf auth login`, or set HF_TOKEN, with a token that can read it"
    if isinstance(error, GatedRepoError):
        terms = f"Accept its terms at {constants.ENDPOINT}/{source}, then {login}."
        return f"the model is gated, and {token}. {terms}"
    return f"there is no such model, or it is private, and {token}. Check the name, or {login}."


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 300 characters, without its full stop."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."
