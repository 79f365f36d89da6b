"""Bringing the user's code into the code directory: from S3, a directory, a tar archive, or a single file.

A code directory that already holds something is kept as it is, as the reference keeps it; but the log says which
source was ignored. New code is put together in a directory beside and moved in when it is complete, so that a
failed attempt leaves an empty code directory and can be repeated.
"""

from __future__ import annotations

import os

from launcher.container.reading import shown
from launcher.errors import ClusterError, ContractError, OutputError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import tarfile
    from collections.abc import Callable

    from launcher.container.facts import Container

_FIELD = "sagemaker_submit_directory"
_BLOCK_BYTES = 1 << 20


class CodeSource(Record):
    """Where code is to come from, and who says so.

    Attributes:
        uri: ``s3://``, ``file://``, or the path of a directory, a tar archive or a file.
        file, field: what an error names: the file or the variable that says ``uri``.
    """

    uri: str
    file: str
    field: str
    region: str | None = None
    endpoint_url: str | None = None


def prepare_code(container: Container, log: Callable[[str], None]) -> bool:
    """Fill the code directory from ``container.submit_dir``. Arguments, result and errors as for :func:`fetch_code`."""
    source = CodeSource(
        container.submit_dir, container.hyperparameters.file, _FIELD, container.region, container.s3_endpoint_url
    )
    return fetch_code(source, container.paths.code_dir, log)


def fetch_code(source: CodeSource, code_dir: str, log: Callable[[str], None]) -> bool:
    """Fill ``code_dir`` from ``source``. Returns whether anything was put there.

    Args:
        log: takes one line of text; a line to be noticed begins with ``WARNING:``.

    Raises:
        ContractError: the source is missing, not what it says, refused, or unsafe to unpack.
        ClusterError: S3 could not be reached.
        OutputError: the code directory cannot be written.
    """
    path = source.uri.removeprefix("file://")
    try:
        os.makedirs(code_dir, exist_ok=True)
        present = sorted(os.listdir(code_dir))
    except OSError as error:
        raise OutputError(f"cannot use the code directory {code_dir} ({error.strerror})") from error
    if not path.startswith("s3://") and os.path.realpath(path) == os.path.realpath(code_dir):
        return False
    if present:
        names = ", ".join(present[:3]) + (", ..." if len(present) > 3 else "")
        log(f"WARNING: {code_dir} is not empty ({names}): it is used as it is, and {source.uri} is ignored")
        return False
    _fill(source, path, code_dir)
    log(f"code: {source.uri} -> {code_dir}")
    return True


def _fill(source: CodeSource, path: str, code_dir: str) -> None:
    import shutil
    import tempfile

    parent = os.path.dirname(code_dir)
    # Not writable: the code directory is a mount of its own, and the system's temporary directory has to do.
    beside = parent if os.access(parent, os.W_OK) else None
    try:
        with tempfile.TemporaryDirectory(prefix=".code-", dir=beside) as scratch:
            new = os.path.join(scratch, "new")
            os.mkdir(new, 0o755)
            if path.startswith("s3://"):
                archive = os.path.join(scratch, "archive")
                _download(source, archive)
                _unpack(archive, new, path, source.file)
            else:
                _copy(source, path, new)
            for name in os.listdir(new):
                shutil.move(os.path.join(new, name), os.path.join(code_dir, name))
    except OSError as error:
        raise OutputError(f"cannot put the code from {path} into {code_dir}: {error}") from error


def _copy(source: CodeSource, path: str, new: str) -> None:
    import shutil
    import tarfile

    if os.path.isdir(path):
        root, target = os.path.realpath(path), os.path.realpath(new)
        if os.path.commonpath([root, target]) == root:
            found = shown(path)
            raise ContractError(
                source.file, source.field, found, "a directory that does not contain the code directory"
            )
        # Links are followed: their targets may not be where the code goes.
        shutil.copytree(path, new, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    elif not os.path.isfile(path):
        found = f"{shown(path)}, which is not there"
        raise ContractError(source.file, source.field, found, "s3://, a directory or a file")
    elif tarfile.is_tarfile(path):
        _unpack(path, new, path, source.file)
    elif path.endswith((".tar", ".tar.gz", ".tgz")):
        raise ContractError(path, "", "a file that is not a tar archive", "a tar archive, compressed or not")
    else:
        shutil.copy2(path, new)


def _download(source: CodeSource, target: str) -> None:
    uri = source.uri
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise ContractError(source.file, source.field, shown(uri), "s3://bucket/key")
    try:
        import boto3
        import botocore.exceptions
    except ImportError as error:
        found = f"{shown(uri)}, but the Python package boto3 is not installed"
        raise ContractError(
            source.file, source.field, found, "pip install boto3, or code that is in the image"
        ) from error
    try:
        client = boto3.client("s3", region_name=source.region, endpoint_url=source.endpoint_url)
        client.download_file(bucket, key, target)
    except botocore.exceptions.ClientError as error:
        found = f"{shown(uri)}: {error}"
        raise ContractError(source.file, source.field, found, "an object that this job's role may read") from error
    except botocore.exceptions.BotoCoreError as error:
        raise ClusterError(f"cannot download {uri}: {error}") from error


def _unpack(archive: str, target: str, source: str, file: str) -> None:
    """Unpack the tar file ``archive`` into ``target``. No member may reach outside it, by name or by link."""
    import tarfile
    import zlib

    try:
        with tarfile.open(archive, "r:*") as opened:
            for member in opened:
                _check_member(member, target, source)
                # The second half of the defence, where Python has it (3.10.12, 3.11.4 and later): modes, owners.
                if hasattr(tarfile, "data_filter"):
                    opened.extract(member, target, filter="data")
                else:
                    member.mode = member.mode & 0o755 | (0o700 if member.isdir() else 0o600)
                    opened.extract(member, target)
            # The checksum of a compressed archive follows the last member and is only checked by reading on.
            while opened.fileobj is not None and opened.fileobj.read(_BLOCK_BYTES):
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        # The decompressors report damage as OSError without a number; one with a number is the disk's.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ContractError(source, "", f"a file that cannot be unpacked ({error})", "a whole tar archive") from error


def _check_member(member: tarfile.TarInfo, target: str, source: str) -> None:
    """Refuse devices, and names or links that lead outside, with the links unpacked so far followed."""
    root = os.path.realpath(target)

    def leaves(path: str) -> bool:
        return os.path.commonpath([root, os.path.realpath(os.path.join(root, path))]) != root

    # A symbolic link is relative to its own place, a hard link to the top of the archive.
    link_base = os.path.dirname(member.name) if member.issym() else ""
    if member.isdev():
        found = "a device or FIFO"
    elif os.path.isabs(member.name) or leaves(member.name):
        found = "a name that leads outside"
    elif (member.issym() or member.islnk()) and leaves(os.path.join(link_base, member.linkname)):
        found = f"a link to {member.linkname}, which is outside"
    else:
        return
    raise ContractError(source, member.name, found, "members that stay inside the code directory")
