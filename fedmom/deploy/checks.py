"""What `fedmom deploy init` checks before it writes anything: names of hosts, and whether files go together."""

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from fedmom.deploy.certificates import check_node_key, hosts_of, read_ca_key, read_certificate
from fedmom.errors import InputError

_PART = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"  # of a host's name


def checked_host(option: str, host: str) -> str:
    """A host as a certificate and a client's settings have it; InputError where it is no name and no address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # A name whose last part is a number is an address that is none: 256.1.1.1, 10.0.0, 0x7f.1.
        last = host.rpartition(".")[2]
        number = last.isdecimal() or re.fullmatch(r"0[xX][0-9a-fA-F]*", last)
        if len(host) <= 253 and re.fullmatch(rf"{_PART}(\.{_PART})*", host) and not number:
            return host
    else:
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id:
            raise InputError(
                f"{option} {host!r}: the part after % names an interface of one machine; no certificate is made out "
                "for it, take an address without it, or a name"
            )
        return str(address)
    raise InputError(f"{option} {host!r}: must be a name in ASCII or an IP address, without a port (--port has it)")


def reachable_host(option: str, host: str) -> str:
    """The same for a host that other machines connect to; InputError where none can be there for them."""
    checked = checked_host(option, host)
    try:
        address = ipaddress.ip_address(checked)
    except ValueError:
        itself = host.lower() == "localhost" or host.lower().endswith(".localhost")
    else:
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        if (
            address.is_unspecified
            or address.is_multicast
            or str(address) == "255.255.255.255"
            or (isinstance(address, ipaddress.IPv6Address) and address.is_link_local)
        ):
            raise InputError(
                f"{option} {host!r}: is no address of a machine; name the one at which the clients reach this machine"
            )
        itself = address.is_loopback
    if itself:
        raise InputError(
            f"{option} {host!r}: is every machine's own; name the one at which the clients reach this machine, or "
            f"leave {option} out for clients on this one"
        )
    return checked


def check_parts(folder: Path, num_clients: int, hosts: Sequence[str], *, elsewhere: bool) -> None:
    """InputError where what is there does not go together, or cannot be completed."""
    ca, ca_key = folder / "ca.pem", folder / "ca-key.pem"
    certificate, key = folder / "server" / "server.pem", folder / "server" / "server-key.pem"
    if ca.exists() != ca_key.exists():
        made = ca if ca.exists() else ca_key
        raise InputError(f"{folder}: has {made.name} but not its pair; bring it back, or move it away as well")
    if certificate.exists() != key.exists():
        raise InputError(f"{folder / 'server'}: has one of server.pem and server-key.pem; move it away for a new pair")
    if ca.exists():
        read_certificate(ca)
        if not certificate.exists():
            read_ca_key(ca_key)
    if certificate.exists():
        known = hosts_of(read_certificate(certificate))
        missing = [host for host in hosts if host not in known]
        if missing:
            raise InputError(
                f"{certificate}: is not made out for {missing[0]}; move it and {key.name} away and call init again"
            )
    for c in range(num_clients):
        key, public = folder / f"client-{c}" / "node.key", folder / f"client-{c}" / "node.key.pub"
        if key.exists() and not public.exists():
            check_node_key(key)
        # A client elsewhere that made its own key brings the public half alone.
        if public.exists() and not key.exists() and not elsewhere:
            raise InputError(
                f"{key}: is missing, and a client on this machine needs it beside {public.name}; bring it back, or "
                f"move {public.name} away for a new pair"
            )
