#!/usr/bin/python3
"""The other side of the interoperation tests: a JOSE library that is not ours.

Reads a list of jobs as JSON from stdin, writes the list of their results to stdout.

    {"do": "open", "jwe": TEXT, "key": PEM of the private key, or a symmetric one as a JWK}
        -> {"plaintext": HEX, "protected": TEXT, "thumbprint": kid of the key}
    {"do": "seal", "plaintext": HEX, "protected": TEXT, "recipients": [{"key": PEM, "header": {…} or null}, …]}
        -> {"own": what the library writes, "canonical": the same as docs/envelope.md wants it}
"""

import json
import sys

try:
    from jwcrypto import jwe, jwk
except ImportError as error:
    print(f"jwcrypto is missing ({error}): apt-get install python3-jwcrypto", file=sys.stderr)
    sys.exit(3)


def read_key(text):
    return jwk.JWK.from_json(text) if text.startswith("{") else jwk.JWK.from_pem(text.encode())


def open_jwe(job):
    key = read_key(job["key"])
    token = jwe.JWE()
    token.deserialize(job["jwe"], key=key)
    return {
        "plaintext": token.payload.hex(),
        "protected": token.objects["protected"],
        "thumbprint": key.thumbprint(),
    }


def seal_jwe(job):
    token = jwe.JWE(plaintext=bytes.fromhex(job["plaintext"]), protected=job["protected"])
    for recipient in job["recipients"]:
        header = recipient["header"]
        token.add_recipient(
            read_key(recipient["key"]),
            header=json.dumps(header) if header else None,
        )
    own = token.serialize()
    return {"own": own, "canonical": canonical(json.loads(own))}


def canonical(token):
    """The members in the order of docs/envelope.md, without white space."""

    def stanza(recipient):
        header = {name: recipient["header"][name] for name in sorted(recipient["header"])}
        if "epk" in header:
            header["epk"] = {name: header["epk"][name] for name in ("kty", "crv", "x", "y")}
        return {"header": header, "encrypted_key": recipient["encrypted_key"]}

    ordered = {"protected": token["protected"]}
    if "recipients" in token:
        ordered["recipients"] = [stanza(recipient) for recipient in token["recipients"]]
    else:
        ordered["encrypted_key"] = token["encrypted_key"]
    for name in ("iv", "ciphertext", "tag"):
        ordered[name] = token[name]
    return json.dumps(ordered, separators=(",", ":"))


JOBS = {"open": open_jwe, "seal": seal_jwe}
json.dump([JOBS[job["do"]](job) for job in json.load(sys.stdin)], sys.stdout)
