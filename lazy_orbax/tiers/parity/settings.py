"""What a user says of parity: one record."""

from __future__ import annotations

import dataclasses
import socket

from lazy_orbax.errors import OptionError
from lazy_orbax.tiers.parity.addresses import is_everywhere

_MOST_MEMBERS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """How the processes of a job keep parity of each other's snapshots.

    Attributes:
        group: members of a group, from 2 (each has a copy of the other's snapshot) to 32. Any one
            of them may be lost. Each keeps 1/(group - 1) of a snapshot more, in each of two
            generations.
        domain: what fails as a whole with this process, such as the name of its rack. No two
            members of a group are of one domain. `None` is the name of the host.
        host: the address of the interface to listen on, IPv4 or IPv6, or a name that has it: the
            others reach this process by it. `None` is the one by which this machine reaches JAX's
            coordinator.
        bytes_per_s: most bytes that this process sends in a second for the sake of parity; `None`
            is no limit. What restores ask for has none.
        timeout_s: most seconds that an exchange, or making a snapshot again, may take.
        secret: what only the processes of the job know, of 16 characters at least. `None`: the
            first process makes one up, and tells it by JAX's coordinator, which hands it to
            whoever can reach it.
        tls: paths of a certificate, its private key, and the certificate of the authority that
            signed those of all processes, each in PEM. `None` is no encryption.

    Raises:
        OptionError: a value is out of range.
    """

    group: int = 4
    domain: str | None = None
    host: str | None = None
    bytes_per_s: int | None = 2**29
    timeout_s: float = 300.0
    secret: str | None = dataclasses.field(default=None, repr=False)
    tls: tuple[str, str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.group, int) or not 2 <= self.group <= _MOST_MEMBERS:
            raise OptionError(f"group={self.group!r} must be from 2 to {_MOST_MEMBERS}.")
        if self.host is not None and is_everywhere(self.host):
            raise OptionError(
                f"host={self.host!r} is every interface, by which no other process reaches this "
                "one; give the address of one interface, or None."
            )
        limit = self.bytes_per_s
        if limit is not None and (not isinstance(limit, int) or limit < 2**20):
            raise OptionError(f"bytes_per_s={limit!r} must be at least {2**20} (1 MiB), or None.")
        if not isinstance(self.timeout_s, int | float) or not 1 <= self.timeout_s <= 86400:
            raise OptionError(f"timeout_s={self.timeout_s!r} must be from 1 to 86400 seconds.")
        if self.secret is not None and len(self.secret) < 16:
            raise OptionError("secret must have 16 characters at least, or be None.")
        if self.tls is not None and len(self.tls) != 3:
            raise OptionError("tls must be the paths of a certificate, its key, and an authority.")

    @property
    def domain_here(self) -> str:
        """What fails as a whole with this process."""
        return self.domain or socket.gethostname()


@dataclasses.dataclass(frozen=True)
class NodeSettings:
    """What a node knows from its beginning.

    Attributes:
        directory: of the shelf.
        run: the run.
        process: which process of the job it works for.
        secret: of the job.
        host: the address of the interface to listen on.
        bytes_per_s: most bytes a second that it sends for exchanges.
        timeout_s: most seconds for an exchange, or for making a snapshot again.
        tls: paths of certificate, key and authority.
    """

    directory: str
    run: str
    process: int
    secret: str = dataclasses.field(repr=False)
    host: str = "127.0.0.1"
    bytes_per_s: int | None = None
    timeout_s: float = 300.0
    tls: tuple[str, str, str] | None = None
