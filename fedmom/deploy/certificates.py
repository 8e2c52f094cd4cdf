"""A private certificate authority, the server's certificate, node keys and shared secrets, as Flower wants them.

Certificates are PEM; a node's key is the pair that ssh-keygen would write. Nothing is ever written over.
"""

import base64
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedmom.errors import InputError, missing_package

try:  # it comes with Flower
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ModuleNotFoundError as error:
    raise missing_package("fedmom deploy", "cryptography", "flower") from error

CA_DAYS, SERVER_DAYS = 3650, 398
_PART = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"  # of a host's name
_CURVE, _HASH = ec.SECP384R1, hashes.SHA384
_USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def write_new(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """A file that was not there before, whole or not at all; InputError where it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode)  # whatever the umask says
        os.link(temporary, path)  # unlike a rename, it never replaces
    except FileExistsError:
        raise InputError(f"{path}: exists already; it is never written over (move it away for a new one)") from None
    finally:
        temporary.unlink(missing_ok=True)


def make_authority(certificate: Path, key: Path, *, days: int = CA_DAYS) -> None:
    """The CA: its certificate, which every node gets, and its key, which stays where it is."""
    private = ec.generate_private_key(_CURVE())
    name = _name("fedmom deployment CA")
    signed = _sign(name, private.public_key(), name, private, days=days, hosts=None)
    write_new(key, _pkcs8(private))
    write_new(certificate, signed, mode=0o644)


def make_server_certificate(
    certificate: Path, key: Path, *, ca: Path, ca_key: Path, hosts: Sequence[str], days: int = SERVER_DAYS
) -> None:
    """The SuperLink's certificate for `hosts` (names or addresses), signed by the CA."""
    authority, authority_key = read_certificate(ca), read_ca_key(ca_key)
    private = ec.generate_private_key(_CURVE())
    signed = _sign(
        _name(hosts[0]),
        private.public_key(),
        authority.subject,
        authority_key,
        days=days,
        hosts=hosts,
        issuer=authority,
    )
    write_new(key, _pkcs8(private))
    write_new(certificate, signed, mode=0o644)


def make_node_key(path: Path) -> None:
    """A SuperNode's key pair: `path` and `path`.pub."""
    private = ec.generate_private_key(_CURVE())
    form = serialization.PrivateFormat.OpenSSH
    write_new(path, private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    make_public_half(path)


def check_node_key(path: Path) -> serialization.SSHPublicKeyTypes:
    """The public half of a SuperNode's key; InputError where the file is no such key."""
    try:
        return serialization.load_ssh_private_key(path.read_bytes(), None).public_key()
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: is no key as ssh-keygen writes it, or has a passphrase ({error})") from None


def make_public_half(path: Path) -> None:
    """`path`.pub of a SuperNode's key at `path`."""
    public = check_node_key(path)
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_new(path.with_name(path.name + ".pub"), line + b"\n", mode=0o644)


def as_sent(path: Path) -> str:
    """A node's public key (node.key.pub) as the node sends it with every request, and the gate logs it."""
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: is no public key as ssh-keygen writes it ({error})") from None
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return base64.b64encode(key.public_bytes(serialization.Encoding.PEM, form)).decode()


def make_secret(path: Path) -> None:
    """What a SuperLink or SuperNode and its superexec share."""
    write_new(path, secrets.token_hex(32).encode())


def read_certificate(path: Path) -> x509.Certificate:
    """InputError where it is missing or broken."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `fedmom deploy init` makes it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no certificate in PEM ({error})") from None


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that it is made out for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def days_left(certificate: x509.Certificate) -> int:
    """Whole days until it expires; negative where it has."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)).days


def read_ca_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The CA's key; InputError where it is missing or broken."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the CA's key signs new certificates, bring it back") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: is no private key in PEM ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path}: is no elliptic-curve key")
    return key


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        try:
            return x509.DNSName(host)
        except ValueError:
            raise InputError(f"--host {host!r}: must be a name in ASCII or an IP address") from None


def _sign(
    name: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer_name: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    days: int,
    hosts: Sequence[str] | None,
    issuer: x509.Certificate | None = None,
) -> bytes:
    """A certificate in PEM: of a CA where there are no hosts, else of a server."""
    now, ca = datetime.now(UTC), hosts is None
    end = now + timedelta(days=days)
    if issuer is not None:
        end = min(end, issuer.not_valid_after_utc)
    used = ("key_cert_sign", "crl_sign", "digital_signature") if ca else ("digital_signature", "key_agreement")
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer_name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(x509.KeyUsage(**{use: use in used for use in _USES}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if hosts is not None:
        names = x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys(hosts)])
        server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(names, critical=False).add_extension(server, critical=False)
    return builder.sign(issuer_key, _HASH()).public_bytes(serialization.Encoding.PEM)


def _pkcs8(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


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
