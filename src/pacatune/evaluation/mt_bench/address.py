"""The address of an OpenAI-compatible endpoint."""

from urllib.parse import urlsplit

__all__ = ["checked_url"]


def checked_url(url: str) -> str:
    """Return where to send requests: the address with `/chat/completions` at its end.

    Args:
        url: What the user gave; it is shown and saved, so it must hold no secret.

    Raises:
        ValueError: If it is none, or has a user, a password or a query in it.
    """
    try:
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        has_port = parts.port is None or parts.port > 0  # raises for one that is no number
    except ValueError:
        raise ValueError(
            "--judge-url must be like https://HOST/v1; the host or the port of the one given "
            "cannot be read."
        ) from None
    has_secret = bool(parts.query or parts.fragment or parts.username or parts.password)
    is_clean = url.isprintable() and " " not in url and has_port
    if parts.scheme not in ("http", "https") or not parts.hostname or has_secret or not is_clean:
        raise ValueError(
            f"--judge-url ({shown!r}) must be like https://HOST/v1, without user, password or "
            "query; a key goes into a variable: --judge-key-env NAME."
        )
    url = url.rstrip("/")
    return url if url.endswith("/chat/completions") else f"{url}/chat/completions"
