"""The secret that the hosts of a job prove to each other, and the keys made from it.

The secret itself never crosses the network. What does lets an eavesdropper try guesses at leisure, so it should be
random: ``openssl rand -hex 32``.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat

from launcher.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "LAUNCHER_SECRET"
_LONGEST_BYTES = 64 << 10


def job_digest(*parts: str) -> str:
    """What tells one job from another in clear text: a digest of what all its hosts know alike (32 digits)."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(4, "big") + data)
    return digest.hexdigest()[:32]


def job_key(secret: bytes) -> bytes:
    """The key (32 bytes) of all hosts that were given ``secret``."""
    return hmac.digest(b"launcher: key of a job's secret", secret, "sha256")


def key_without_secret(job: str) -> bytes:
    """The key (32 bytes) of a job without a secret. Whoever knows the job can make it: it keeps no attacker out."""
    return hmac.digest(b"launcher: key of a job without a secret", job.encode(), "sha256")


def read_secret(environ: Mapping[str, str], file: str = "", source: str = "option --secret-file") -> tuple[bytes, str]:
    """The job's secret and where it was found; ``(b"", "")`` when none was given.

    Args:
        file: path of the file with the secret; empty for none.
        source: what named the file.

    Raises:
        UsageError: the file can not be read, others may read or write it, the secret is empty, or the file and
            LAUNCHER_SECRET hold different ones.
    """
    given = environ.get(VARIABLE)
    if given == "":
        raise UsageError(f"environment variable {VARIABLE} is empty; set it to the job's secret, or unset it")
    secret = os.fsencode(given) if given else b""
    if not file:
        return secret, f"environment {VARIABLE}" if secret else ""
    from_file = _read_file(file, f"{source} ({file})")
    if secret and not hmac.compare_digest(secret, from_file):
        raise UsageError(
            f"{source} ({file}) and environment {VARIABLE} hold different secrets; leave one of the two out"
        )
    return from_file, f"{source} ({file})"


def _read_file(path: str, what: str) -> bytes:
    try:
        # A FIFO would hold the launcher until someone writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise UsageError(f"{what}: {getattr(error, 'strerror', None) or error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{what}: not a regular file")
        if status.st_mode & (stat.S_IROTH | stat.S_IWOTH):
            raise UsageError(
                f"{what}: every user of this host may read or write it (mode {stat.S_IMODE(status.st_mode):04o}); "
                "`chmod 600` it, or mount it with `defaultMode: 0400`"
            )
        if status.st_size > _LONGEST_BYTES:
            raise UsageError(f"{what}: {status.st_size} bytes are no secret; at most {_LONGEST_BYTES} are read")
        secret = os.read(descriptor, _LONGEST_BYTES).rstrip(b"\r\n")
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if not secret:
        raise UsageError(f"{what}: the file is empty; it must hold the job's secret")
    return secret
