"""Installing what the user's code needs, with pip, before any rank starts."""

from __future__ import annotations

import os

from launcher.errors import ContractError, LauncherError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# pip ends its report with the reason; the lines before are progress.
_LAST_LINES = 20


def install_requirements(code_dir: str, python: str, log: Callable[[str], None], environ: Mapping[str, str]) -> bool:
    """``pip install -r requirements.txt`` in ``code_dir`` with the interpreter ``python``, if there is such a file.

    Unlike the reference this is also meant for shell scripts and binaries. An index that needs a token
    (``CA_REPOSITORY_ARN``, AWS CodeArtifact) reaches pip by its environment and so stays out of process lists
    and error texts.

    Args:
        log: takes each line of pip's output.
        environ: environment for pip.

    Returns:
        Whether there was anything to install.

    Raises:
        LauncherError: pip failed; ``exit_code`` is 1, the text has the end of pip's error output.
        ContractError: ``CA_REPOSITORY_ARN`` is malformed.
    """
    if not os.path.isfile(os.path.join(code_dir, "requirements.txt")):
        return False
    _pip(code_dir, python, ["-r", "requirements.txt"], "InstallRequirementsError", log, environ)
    return True


def install_package(code_dir: str, python: str, log: Callable[[str], None], environ: Mapping[str, str]) -> None:
    """``pip install .`` in ``code_dir``, together with ``requirements.txt`` if there is one.

    Arguments and errors as for :func:`install_requirements`.
    """
    arguments = ["."]
    if os.path.isfile(os.path.join(code_dir, "requirements.txt")):
        arguments += ["-r", "requirements.txt"]
    _pip(code_dir, python, arguments, "InstallModuleError", log, environ)


def _pip(
    code_dir: str,
    python: str,
    arguments: list[str],
    error_name: str,
    log: Callable[[str], None],
    environ: Mapping[str, str],
) -> None:
    import collections
    import subprocess

    from launcher.container.masking import mask_text

    command = [python, "-m", "pip", "install", *arguments]
    child = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", **environ}
    if environ.get("CA_REPOSITORY_ARN"):
        child["PIP_INDEX_URL"] = _codeartifact_index(environ["CA_REPOSITORY_ARN"])
    log(f"installing in {code_dir}: {' '.join(command)}")
    last: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    try:
        # One pipe for both streams keeps their order and cannot block on the one that is not read.
        pip = subprocess.Popen(
            command,
            cwd=code_dir,
            env=child,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="backslashreplace",
        )
    except OSError as error:
        raise _failed(f"{error_name}: cannot start {python}: {error.strerror}") from error
    with pip:
        for line in pip.stdout or ():
            text = mask_text(line.rstrip("\n"))
            last.append(text)
            log(text)
    if pip.returncode != 0:
        command_text = " ".join(command)
        how = f"exit code {pip.returncode}" if pip.returncode > 0 else f"signal {-pip.returncode}"
        # The reason is at the end, the failure text is cut at its end: so errors first, then the rest.
        errors = [line for line in last if line.lstrip().startswith("ERROR:")]
        rest = [line for line in last if line not in errors]
        raise _failed("\n".join([f"{error_name}: {command_text}: {how}", *errors, *rest]))


def _failed(text: str) -> LauncherError:
    error = LauncherError(text)
    # The user's requirements are to blame, so the code is a script's, as under the reference.
    error.exit_code = 1
    return error


def _codeartifact_index(arn: str) -> str:
    """The index URL, with a fresh token in it, of ``arn:PARTITION:codeartifact:REGION:ACCOUNT:repository/DOMAIN/NAME``.

    Source: https://docs.aws.amazon.com/codeartifact/latest/ug/python-configure-pip.html
    """
    parts = arn.split(":", 5)
    path = parts[5].split("/", 2) if len(parts) == 6 else []
    if len(path) != 3 or parts[0] != "arn" or parts[2] != "codeartifact" or path[0] != "repository" or "" in path:
        expected = "arn:PARTITION:codeartifact:REGION:ACCOUNT:repository/DOMAIN/NAME"
        raise ContractError("environment", "CA_REPOSITORY_ARN", repr(arn), expected)
    region, account, domain, repository = parts[3], parts[4], path[1], path[2]
    try:
        import boto3
        import botocore.exceptions
    except ImportError as error:
        found = f"{arn!r}, but the Python package boto3 is not installed"
        raise ContractError("environment", "CA_REPOSITORY_ARN", found, "pip install boto3 in the image") from error
    try:
        client = boto3.client("codeartifact", region_name=region)
        token = client.get_authorization_token(domain=domain, domainOwner=account)["authorizationToken"]
        endpoint = client.get_repository_endpoint(
            domain=domain, domainOwner=account, repository=repository, format="pypi"
        )["repositoryEndpoint"]
    except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
        raise _failed(f"InstallRequirementsError: CodeArtifact repository {arn}: {error}") from error
    return str(endpoint).rstrip("/").replace("https://", f"https://aws:{token}@", 1) + "/simple/"
