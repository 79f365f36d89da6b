"""Hiding secrets in what is logged: environments, hyperparameters and argument lists.

A name is taken for a secret's when it contains one of a few words, which hides a little too much (``max_tokens``)
rather than too little. Values are looked into: JSON objects and lists at any depth, ``key=value`` and
``'key': 'value'`` texts, and the password in a URL.
"""

from __future__ import annotations

import json
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

MASK = "******"

_WORDS = "KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|PRIVATE|AUTH"
# "AUTH" would hide AUTHOR, and the path of ssh-agent's socket is no secret.
_HARMLESS = "AUTHOR|SSH_AUTH_SOCK"


def is_secret(name: str) -> bool:
    """Whether ``name`` is one that usually stands for a secret."""
    return bool(re.search(_WORDS, re.sub(_HARMLESS, "", name.upper())))


def mask_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """A copy of an environment that may be logged; the names and their order are kept."""
    return {name: mask_value(name, value) for name, value in environ.items()}


def mask_args(args: Sequence[str]) -> list[str]:
    """A copy of an argument list that may be logged: ``--api-key X``, ``--api-key=X`` and ``KEY=X`` are hidden."""
    result: list[str] = []
    hide = False
    for arg in args:
        is_name = bool(re.match(r"-{1,2}[A-Za-z_]", arg)) and "=" not in arg
        # A secret may begin with a dash itself, so what follows a secret's name is hidden whatever it is.
        result.append(MASK if hide and arg else mask_text(arg))
        hide = is_name and not hide and is_secret(arg)
    return result


def mask_value(name: str, value: Any) -> Any:
    """``value`` (text or anything from JSON) as it may be logged under ``name``."""
    if is_secret(name) and not isinstance(value, (dict, list)):
        return MASK if value not in ("", None) else value
    if isinstance(value, dict):
        return {key: mask_value(f"{name}.{key}" if is_secret(name) else str(key), item) for key, item in value.items()}
    if isinstance(value, list):
        if is_secret(name):
            return [mask_value(name, item) for item in value]
        if all(isinstance(item, str) for item in value):
            return mask_args(value)
        return [mask_value("", item) for item in value]
    return mask_text(value) if isinstance(value, str) else value


def mask_text(text: str) -> str:
    """``text`` with the secrets that can be recognised in it hidden: JSON, ``key=value`` pairs, URLs."""
    if text[:1] in ("{", "["):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            parsed = None  # not JSON; a Python repr, which the pairs below find
        if isinstance(parsed, (dict, list)):
            masked = mask_value("", parsed)
            # An untouched text keeps its own spelling.
            return text if masked == parsed else json.dumps(masked, sort_keys=True, separators=(",", ":"))
    text = re.sub(r"(?<=://)([^/@\s:]*):[^/@\s]+@", rf"\1:{MASK}@", text)
    # A name starts where no word goes on: tried at every letter, a long word would cost quadratic time.
    pair = r"""(?<![\w.-])(?P<name>[\w.-]+)(?P<between>['"]?\s*[:=]\s*)(?P<value>'[^']*'|"[^"]*"|[^\s,;&}\])'"]+)"""
    return re.sub(pair, _mask_pair, text)


def _mask_pair(match: re.Match[str]) -> str:
    if not is_secret(match["name"]):
        return match[0]
    value = match["value"]
    quote = value[0] if value[0] in "'\"" else ""
    return f"{match['name']}{match['between']}{quote}{MASK}{quote}"
