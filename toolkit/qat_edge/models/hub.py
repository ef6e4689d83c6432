"""Is the Hugging Face Hub there? Asked once and quickly, where its client would retry for half a minute."""

from __future__ import annotations

import urllib.error
import urllib.request

from huggingface_hub import constants

PROBE_TIMEOUT_S = 5.0


def unreachable() -> str:
    """Why the Hub cannot be reached, empty where it can. What was downloaded before is usable either way.

    Where it cannot, the process goes offline as HF_HUB_OFFLINE=1 would have set it: caches only, no retries.
    """
    if constants.HF_HUB_OFFLINE:
        return "this process is offline (HF_HUB_OFFLINE, or an earlier attempt failed)"
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PROBE_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answered; what it thinks of this page does not matter
    except OSError as error:
        constants.HF_HUB_OFFLINE = True
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return f"{constants.ENDPOINT}: {reason}"
