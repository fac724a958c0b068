"""Passwords in the URIs of MLflow stores. They are never in a file that other users can read.

Configs and logs use the URI without the password. A process that connects finds the full URI in its memory, in
MLFLOW_TRACKING_URI, or in runs_dir/.secrets.json, which only its owner can read.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from filelock import FileLock

from relora.common.errors import DamagedFile
from relora.common.files import read_json, sync_folder

FILE = ".secrets.json"
"""A file in runs_dir: URI without its password -> full URI."""
VARIABLE = "MLFLOW_TRACKING_URI"
SECRET_PARAMETERS = ("password", "passwd", "pwd", "sslpassword", "token", "odbc_connect")
"""Parameters in the query of a URI from which database drivers read a password."""
SHORTEST_HIDDEN = 4
"""Minimum number of characters of a password that is hidden in texts. Shorter ones are part of common words."""

_whole: dict[str, str] = {}
"""The URIs that this process knows: URI without its password -> full URI."""


def without_password(uri: str) -> str:
    """Return the URI without its passwords."""
    return _split(uri)[0]


def learn(uri: str) -> str:
    """Remember the full URI in this process, and return the URI without its passwords."""
    public, passwords = _split(uri)
    if passwords:
        _whole[public] = uri
    return public


def whole(uri: str, runs_dir: Path) -> str:
    """Return the full URI to connect to, for a URI without its password.

    It comes from this process, from MLFLOW_TRACKING_URI, or from the file that a launch wrote into `runs_dir`. If none
    of them has the full URI, `uri` is returned.
    """
    if uri in _whole:
        return _whole[uri]
    given = os.environ.get(VARIABLE, "")
    if without_password(given) == uri:
        return learn(given) and given
    try:
        kept = read_json(runs_dir / FILE).get(uri)
    except DamagedFile:  # or it belongs to another user
        kept = None
    return _whole.setdefault(uri, kept) if isinstance(kept, str) and without_password(kept) == uri else uri


def keep(uri: str | None, runs_dir: Path) -> None:
    """Save the password of a store, if it has one, for jobs and later commands. Only the owner can read the file."""
    if uri is None or (known := whole(uri, runs_dir)) == uri:
        return
    runs_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(runs_dir / f"{FILE}.lock"):
        try:
            values = read_json(runs_dir / FILE)
        except DamagedFile:
            values = {}
        if values.get(uri) == known:
            return
        write_private(runs_dir / FILE, json.dumps({**values, uri: known}, indent=2) + "\n")


def write_private(path: Path, text: str) -> None:
    """Write a file atomically that only its owner can read. The caller holds a lock."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def without_passwords(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command without the password in tracker.uri=..., which is remembered."""
    return [_without_password(argument) for argument in arguments]


def _without_password(argument: str) -> str:
    key, _, value = argument.partition("=")
    if key.lstrip("+") != "tracker.uri":
        return argument
    quote = value[:1] if len(value) > 1 and value[:1] == value[-1:] and value[:1] in "'\"" else ""
    uri = value[1:-1].replace(f"\\{quote}", quote) if quote else value
    public = learn(uri)
    return argument if public == uri else f"{key}={public}"


def redacted(text: str) -> str:
    """Return a text for users, such as a library's error message, with *** in place of passwords."""
    for public, known in _whole.items():
        text = text.replace(known, public)
        for password in _split(known)[1]:
            for form in {password, unquote(password)}:
                if len(form) >= SHORTEST_HIDDEN:
                    text = text.replace(form, "***")
    text = re.sub(r"(\w[\w+.-]*://[^\s:/@'\"]*):[^\s@'\"]*@", r"\1:***@", text)
    names = "|".join(SECRET_PARAMETERS)
    return re.sub(rf"([?&](?:{names})=)[^\s&'\"]+", r"\1***", text, flags=re.IGNORECASE)


def _split(uri: str) -> tuple[str, list[str]]:
    """Split a URI into the URI without its passwords, and the list of its passwords."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.startswith("sqlite"):
        return uri, []
    rest, mark, query = rest.partition("?")
    passwords: list[str] = []
    host = re.split(r"[/#]", rest, maxsplit=1)[0]
    # An unescaped "/" may be part of the password. An "@" after a complete host is part of the path.
    user_ends = host.rfind("@") if "@" in host or re.fullmatch(r"[^:]*(:\d+)?", host) else rest.rfind("@")
    user, colon, password = rest[: max(user_ends, 0)].partition(":")
    if colon:
        passwords.append(password)
        rest = user + rest[user_ends:]
    kept = []
    for part in query.split("&") if mark else []:
        name, _, value = part.partition("=")
        if name.lower() in SECRET_PARAMETERS:
            passwords.append(value)
        else:
            kept.append(part)
    rest += f"?{'&'.join(kept)}" if kept else ""
    return f"{scheme}://{rest}", passwords
