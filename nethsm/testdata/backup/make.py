#!/usr/bin/env python3
"""Makes the golden backup files of this folder: `python3 make.py FOLDER`.

An implementation of its own of the backup format (see backupfile.go), with OpenSSL's scrypt and the AES-GCM of the Python
package cryptography. Nonces and salts are fixed, so that the files come out the same each time; a NetHSM's are random.
"""

import hashlib
import pathlib
import struct
import sys

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PASSPHRASE = b"BackupPassphrase"
ENTRIES = [
    ("/.initialized", b""),
    ("/authentication/.version", b"\x01"),
    ("/authentication/admin", b"sealed with the key of its store: " + bytes(60)),
    ("/authentication/operator", b"sealed with the key of its store: " + bytes(61)),
    ("/authentication/backup", b"sealed with the key of its store: " + bytes(62)),
    ("/config/backup-salt", bytes(16)),
    ("/domain-key/attended", bytes(range(80))),
    ("/key/.version", b"\x01"),
    ("/key/unseal", bytes(range(256)) * 8),
    ("/key/one-more", b"x" * 70_000),  # a length that needs its third byte
    ("/namespace/.version", b"\x01"),
    ("/namespace/vaults", b"{}"),
]


def field(data: bytes) -> bytes:
    return struct.pack(">I", len(data))[1:] + data


class Sealer:
    def __init__(self, salt: bytes):
        key = hashlib.scrypt(PASSPHRASE, salt=salt, n=16384, r=8, p=16, dklen=32, maxmem=1 << 26)
        self.gcm, self.count = AESGCM(key), 0

    def seal(self, name: str, data: bytes) -> bytes:
        self.count += 1
        nonce = struct.pack(">IQ", 0x6E6F6E63, self.count)
        return field(nonce + self.gcm.encrypt(nonce, data, name.encode()))


def backup(version: int) -> bytes:
    salt = bytes(range(version, version + 16))
    sealer = Sealer(salt)
    out = b"_NETHSM_BACKUP_" + bytes([version]) + field(salt)
    out += sealer.seal("backup-version", bytes([version]))
    out += sealer.seal("domain-key", bytes(range(100, 160)))
    if version == 1:
        out += sealer.seal("backup-device-id", b"0000000000")
        out += sealer.seal("backup-config-store-key", bytes(range(32)))
    for path, value in ENTRIES:
        out += sealer.seal("backup", field(path.encode()) + value)
    if version == 1:
        out += b"\x00\x00\x00" + b"_NETHSM_BACKUP_END_"
    return out


folder = pathlib.Path(sys.argv[1])
for version in (0, 1):
    (folder / f"v{version}.backup").write_bytes(backup(version))
