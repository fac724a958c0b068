"""Passwords in the URIs of MLflow stores: never written where others read, and known to every process that connects.

A store is named by its URI without the password. The whole URI is in the memory of the process that was given it, in
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
"""In runs_dir: the URI without its password -> the whole URI."""
VARIABLE = "MLFLOW_TRACKING_URI"
SECRET_PARAMETERS = ("password", "passwd", "pwd", "sslpassword", "token", "odbc_connect")
"""Of a URI's query: what database drivers take a password from."""
SHORTEST_HIDDEN = 4
"""Characters of a password that is replaced in any text; a shorter one is part of common words."""

_whole: dict[str, str] = {}
"""What this process was given: the URI without its password -> the whole URI."""


def without_password(uri: str) -> str:
    """The URI that names a store everywhere."""
    return _split(uri)[0]


def learn(uri: str) -> str:
    """Remember a URI's password in this process, and return the URI without it."""
    public, passwords = _split(uri)
    if passwords:
        _whole[public] = uri
    return public


def whole(uri: str, runs_dir: Path) -> str:
    """The URI to connect to, for one without a password: as it was given here, in the environment, or at launch."""
    if uri in _whole:
        return _whole[uri]
    given = os.environ.get(VARIABLE, "")
    if without_password(given) == uri:
        return learn(given) and given
    try:
        kept = read_json(runs_dir / FILE).get(uri)
    except DamagedFile:  # or somebody else's
        kept = None
    return _whole.setdefault(uri, kept) if isinstance(kept, str) and without_password(kept) == uri else uri


def keep(uri: str | None, runs_dir: Path) -> None:
    """Keep a store's password, where it has one, for jobs and later commands, in a file that only its owner reads."""
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
    """Write a file that only its owner can read, whole at any time. The caller holds a lock."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def without_passwords(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, the password of tracker.uri=... remembered and taken out."""
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
    """A text for people, such as a library's error, without the passwords that may stand in it."""
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
    """A URI without its passwords, and these."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.startswith("sqlite"):
        return uri, []
    rest, mark, query = rest.partition("?")
    passwords: list[str] = []
    host = re.split(r"[/#]", rest, maxsplit=1)[0]
    # An unescaped "/" may be part of the password; an "@" behind a complete host is part of the path.
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
