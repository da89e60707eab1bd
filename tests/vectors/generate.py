"""Writes signing.json and bls.json from foreign libraries only, so that they check p2pflock instead of echoing it.

Run: python tests/vectors/generate.py.  Needs eth-abi, py-ecc, pycryptodome.  Deterministic: a second run changes
nothing.  merkle.json and unixfs.json come from merkle_oracle.mjs and unixfs_oracle.mjs beside this file.
Every value is a 0x hex string (integers too), so that pytest and forge read the files alike.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from Crypto.Hash import keccak as pycryptodome_keccak
from eth_abi import encode
from py_ecc.bls import G2ProofOfPossession as Suite
from py_ecc.bls.g2_primitives import pubkey_to_G1, signature_to_G2, subgroup_check
from py_ecc.bls.hash_to_curve import hash_to_G2
from py_ecc.optimized_bls12_381 import add, is_inf, normalize

HERE = Path(__file__).parent
FIELD = int(
    "1a0111ea397fe69a4b1ba7b6434bacd764774b84f38512bf6730d2a0f6b0f6241eabfffeb153ffffb9feffffffffaaab", 16
)


def keccak(data):
    return pycryptodome_keccak.new(digest_bits=256, data=data).digest()


def seeded(label, size=32):
    return hashlib.sha256(label.encode()).digest()[:size]


def hexed(value):
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, int):
        digits = f"{value:x}"
        return "0x" + digits.rjust(len(digits) + len(digits) % 2, "0")
    if isinstance(value, dict):
        return {key: hexed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hexed(item) for item in value]
    return value


def save(name, value):
    (HERE / name).write_text(json.dumps(hexed(value), indent=1) + "\n")


# --- EIP-2537 encodings, from py_ecc's points ---
def words(*numbers):
    return b"".join(int(number).to_bytes(64, "big") for number in numbers)


def g1(point):
    return bytes(128) if is_inf(point) else words(*normalize(point))


def g2(point):
    if is_inf(point):
        return bytes(256)
    x, y = normalize(point)
    return words(*x.coeffs, *y.coeffs)


def key(index):
    secret = Suite.KeyGen(seeded(f"p2pflock vector key {index}"))
    public = Suite.SkToPk(secret)
    return {
        "secretKey": secret.to_bytes(32, "big"),
        "publicKey": public,
        "publicKeyEip2537": g1(pubkey_to_G1(public)),
    }


KEYS = [key(index) for index in range(4)]


# --- digests ---
VOTE_TYPE = (
    b"Vote(uint256 chainId,address anchor,bytes32 task,uint64 epoch,uint64 round,uint64 view,uint8 step,"
    b"bytes32 recordDigest,bytes32 rewardsRoot,bytes32 previousHead)"
)
HEAD_TYPE = b"Head(bytes32 task,uint64 round,bytes32 recordDigest,bytes32 rewardsRoot,bytes32 previousHead)"
POP_TYPE = b"Possession(uint256 chainId,address registry,address operator,bytes32 peerIdHash,bytes32 keyHash)"
PEER_PREFIX = bytes.fromhex("002408011220")


def vote(label, chain_id, epoch, round_, view, step):
    fields = {
        "chainId": chain_id,
        "anchor": seeded(label + " anchor", 20),
        "task": seeded(label + " task"),
        "epoch": epoch,
        "round": round_,
        "view": view,
        "step": step,
        "recordDigest": seeded(label + " record"),
        "rewardsRoot": seeded(label + " rewards"),
        "previousHead": seeded(label + " head"),
    }
    types = ["bytes32", "uint256", "address", "bytes32", "uint64", "uint64", "uint64", "uint8"] + ["bytes32"] * 3
    return {**fields, "digest": keccak(encode(types, [keccak(VOTE_TYPE), *fields.values()]))}


def heads(label, count):
    task = seeded(label + " task")
    previous, out = task, []
    for round_ in range(1, count + 1):
        fields = {
            "task": task,
            "round": round_,
            "recordDigest": seeded(f"{label} record {round_}"),
            "rewardsRoot": seeded(f"{label} rewards {round_}"),
            "previousHead": previous,
        }
        types = ["bytes32", "bytes32", "uint64", "bytes32", "bytes32", "bytes32"]
        previous = keccak(encode(types, [keccak(HEAD_TYPE), *fields.values()]))
        out.append({**fields, "head": previous})
    return out


def possession(index, chain_id):
    label = f"possession {index}"
    peer_id = PEER_PREFIX + seeded(label + " ed25519")
    fields = {
        "chainId": chain_id,
        "registry": seeded(label + " registry", 20),
        "operator": seeded(label + " operator", 20),
        "peerIdHash": keccak(peer_id),
        "keyHash": keccak(KEYS[index]["publicKeyEip2537"]),
    }
    types = ["bytes32", "uint256", "address", "address", "bytes32", "bytes32"]
    root = keccak(encode(types, [keccak(POP_TYPE), *fields.values()]))
    proof = Suite._CoreSign(int.from_bytes(KEYS[index]["secretKey"], "big"), root, Suite.POP_TAG)
    return {
        **fields,
        "peerId": peer_id,
        **KEYS[index],
        "root": root,
        "proof": proof,
        "proofEip2537": g2(signature_to_G2(proof)),
    }


def compute_root(domain, task, body):
    prefix = b"p2pflock/1/" + domain.encode() + b"\0"
    return {
        "domain": domain,
        "task": task,
        "body": body,
        "root": hashlib.sha256(prefix + task + hashlib.sha256(body).digest()).digest(),
    }


VOTES = [
    vote("anvil", 31337, 1, 1, 0, 1),
    vote("base", 8453, 7, 1234, 2, 0),
    vote("limits", 2**256 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 255),
    vote("zero", 0, 0, 0, 0, 0),
]
POSSESSIONS = [possession(index, chain_id) for index, chain_id in enumerate((31337, 8453, 31337, 31337))]
DOMAINS = (
    "peer-record contribution scorecard score-seed proposal request receipt evidence".split()
)


# --- signatures ---
def signature(index, message):
    signed = Suite.Sign(int.from_bytes(KEYS[index]["secretKey"], "big"), message)
    return {
        **KEYS[index],
        "message": message,
        "messageEip2537": g2(hash_to_G2(message, Suite.DST, hashlib.sha256)),
        "signature": signed,
        "signatureEip2537": g2(signature_to_G2(signed)),
    }


def aggregate(indices, message):
    signed = Suite.Aggregate([signature(index, message)["signature"] for index in indices])
    total = pubkey_to_G1(KEYS[indices[0]]["publicKey"])
    for index in indices[1:]:
        total = add(total, pubkey_to_G1(KEYS[index]["publicKey"]))
    return {
        "bitmap": sum(1 << index for index in indices),
        "publicKeys": [KEYS[index]["publicKey"] for index in indices],
        "publicKeysEip2537": [KEYS[index]["publicKeyEip2537"] for index in indices],
        "aggregatePublicKeyEip2537": g1(total),
        "message": message,
        "signature": signed,
        "signatureEip2537": g2(signature_to_G2(signed)),
    }


def outside(read, size):
    """The point with the smallest x on the curve but outside the subgroup, as compressed bytes."""
    x = 0
    while True:
        x += 1
        data = bytearray(x.to_bytes(size, "big"))
        data[0] |= 0x80
        try:
            point = read(bytes(data))
        except ValueError:
            continue
        if not subgroup_check(point):
            return bytes(data), point


def off_curve(read, size):
    x = 0
    while True:
        x += 1
        data = bytearray(x.to_bytes(size, "big"))
        data[0] |= 0x80
        try:
            read(bytes(data))
        except ValueError:
            return bytes(data)


def flip(data, bits):
    return bytes((data[0] ^ bits,)) + data[1:]


def invalid(valid, read, write):
    size = len(valid)
    small, point = outside(read, size)
    modulus = FIELD.to_bytes(48, "big")
    cases = [
        ("empty", b""),
        ("one byte short", valid[:-1]),
        ("one byte long", valid + b"\0"),
        ("no compression flag", flip(valid, 0x80)),
        ("infinity flag on a finite point", flip(valid, 0x40)),
        ("infinity with the sign flag", b"\xe0" + bytes(size - 1)),
        ("infinity with a stray bit", b"\xc0" + bytes(size - 2) + b"\1"),
        ("uncompressed infinity", b"\x40" + bytes(size - 1)),
        ("zeros", bytes(size)),
        ("x equal to the modulus", flip(modulus, 0x80) + bytes(size - 48)),
        ("all ones", b"\xff" * size),
        ("off the curve", off_curve(read, size)),
        ("outside the subgroup", small),
    ]
    if size == 96:
        cases.append(("second coordinate equal to the modulus", valid[:48] + modulus))
    return [{"why": why, "bytes": data} for why, data in cases], write(point)


INVALID_KEYS, OUTSIDE_G1 = invalid(KEYS[0]["publicKey"], pubkey_to_G1, g1)
SIGNATURES = [
    signature(0, b""),
    signature(1, b"p2pflock"),
    signature(2, VOTES[0]["digest"]),
    signature(3, seeded("long") * 10),
]
INVALID_SIGNATURES, OUTSIDE_G2 = invalid(SIGNATURES[0]["signature"], signature_to_G2, g2)


def main():
    save(
        "signing.json",
        {
            "note": "made by generate.py with eth-abi and pycryptodome",
            "voteTypehash": keccak(VOTE_TYPE),
            "headTypehash": keccak(HEAD_TYPE),
            "possessionTypehash": keccak(POP_TYPE),
            "votes": VOTES,
            "heads": heads("chain", 3),
            "possessions": POSSESSIONS,
            "roots": [compute_root(domain, seeded(domain), domain.encode()) for domain in DOMAINS]
            + [compute_root("peer-record", bytes(32), b"")],
        },
    )
    save(
        "bls.json",
        {
            "note": "made by generate.py with py_ecc; suite BLS_SIG_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_",
            "keys": KEYS,
            "signatures": SIGNATURES,
            "aggregates": [
                aggregate([0, 1, 2], VOTES[0]["digest"]),
                aggregate([0, 1, 2, 3], VOTES[0]["digest"]),
                aggregate([1, 3], b"two"),
            ],
            "popProofs": [
                {
                    **KEYS[0],
                    "proof": Suite.PopProve(int.from_bytes(KEYS[0]["secretKey"], "big")),
                }
            ],
            "invalidPublicKeys": [*INVALID_KEYS, {"why": "infinity", "bytes": b"\xc0" + bytes(47)}],
            "invalidSignatures": INVALID_SIGNATURES,
            "outsideSubgroupG1Eip2537": OUTSIDE_G1,
            "outsideSubgroupG2Eip2537": OUTSIDE_G2,
        },
    )


if __name__ == "__main__":
    main()
